"""What attacks over frequencies share: from coarse to fine, how sharp maxima are, what contrast is shown."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dlgbench import contrast, trial
from dlgbench.attacks.adaptive import Adaptive
from dlgbench.attacks.frequencies import Frequencies
from dlgbench.attacks.spectral import Spectral
from dlgbench.leak import Leak
from dlgbench.softening import POOL, SHARPNESS
from dlgbench.spectrum import CONTRAST
from dlgbench.victims import network_of, secret_of

from .clients import PHOTOS, case, error, fitted, leaked, several


def test_batch_norm_hides_the_contrast_about_the_mean_alone_and_it_is_guessed() -> None:
    one = case(attack="spectral", network="resnet18", resolution=64, image=0)  # a photo with black and white
    leak, attack, truth = leaked(one), trial.attack_on([one], network_of(one)), secret_of(one, PHOTOS)
    assert isinstance(attack, Spectral)
    label = F.one_hot(truth.labels, 100).double() * 1e4
    there, pale, dark = (
        attack.spectrum.coefficients((images - attack.network.mean) / CONTRAST)
        for images in (truth.images, 0.7 * attack.network.mean + 0.3 * truth.images, truth.images - 0.1)
    )
    values = [float(attack.evaluate(each, label, leak).objective) for each in (there, pale, dark)]
    assert values[1] == pytest.approx(values[0], rel=1e-2)
    assert values[2] > 2 * values[0]
    assert error(attack.reconstructed(pale), truth.images) < error(attack.pixels(pale), truth.images) / 10


@pytest.mark.parametrize("followed", [False, True])
def test_the_contrast_is_followed_to_what_the_gradient_tells_of_what_was_not_solved(followed: bool) -> None:
    one = case(attack="spectral:iterations=1", network="resnet18", resolution=64, steps=1)
    attack, truth = fitted(one, leaked(one)), secret_of(one, PHOTOS).images
    assert isinstance(attack, Spectral)
    attack.focus(math.inf, 8.0)
    attack.noisy[:] = followed
    deviations = truth - attack.middle
    ours = attack.matched(attack.spectrum.coefficients(0.3 * deviations / CONTRAST)) - attack.middle
    guess = float(contrast.widest(deviations, attack.middle))
    assert abs(math.log(guess)) > 0.1
    torch.testing.assert_close(ours, deviations if followed else guess * deviations, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("network", ["resnet18:batchnorm=shared", "lenet5"])
def test_where_contrast_is_not_hidden_it_is_not_read(network: str) -> None:
    size = 32 if network == "lenet5" else 64
    one = case(attack="spectral:iterations=1", network=network, resolution=size, steps=1)
    attack = fitted(one, leaked(one))
    assert isinstance(attack, Spectral)
    assert attack.variances is None


def test_what_is_returned_fills_the_range_if_the_gradient_does_not_tell() -> None:
    one = case(attack="spectral:iterations=2", network="resnet18", resolution=64, steps=2, dtype="float32")
    attack = fitted(one, leaked(one))
    assert isinstance(attack, Spectral)
    assert torch.equal(attack.result.images, attack.reconstructed(attack.best_images))
    attack.variances = None
    found = attack.reconstructed(attack.best_images)
    assert float(((found < 0) | (found > 1)).float().mean()) == pytest.approx(contrast.CLIPPED, abs=2e-4)


def test_a_grey_image_has_no_contrast_to_guess() -> None:
    one = case(attack="spectral", network="resnet18", resolution=64)
    attack = trial.attack_on([one], network_of(one))
    grey = torch.zeros_like(attack.dummy_images)
    assert torch.equal(attack.reconstructed(grey), attack.pixels(grey))


def test_only_batch_norm_on_batch_statistics_hides_it() -> None:
    for network, hidden in [("lenet5", False), ("resnet18:batchnorm=eval", False), ("resnet18", True)]:
        one = case(attack="spectral", network=network, resolution=32 if network == "lenet5" else 64)
        attack = trial.attack_on([one], network_of(one))
        dummies = attack.dummy_images.detach()
        assert torch.equal(attack.matched(dummies), attack.pixels(dummies)) is not hidden


@pytest.mark.parametrize(("name", "kind"), [("spectral", Spectral), ("adaptive", Adaptive)])
def test_a_large_image_is_sought_from_coarse_to_fine(
    name: str, kind: type[Frequencies], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    one = case(attack=f"{name}:iterations=1", network="resnet18", resolution=128, steps=10, dtype="float32")

    def note(attack: Frequencies, images: torch.Tensor, labels: torch.Tensor, leak: Leak) -> torch.Tensor:
        with torch.no_grad():
            there = attack.spectrum.coefficients(images.detach() - 0.5).abs().amax((0, 1)) > 1e-3
            seen.append(float(attack.spectrum.frequency[there].max()))
        return images.square().mean() + 0 * labels.sum()

    monkeypatch.setattr(kind, "distance", note)
    fitted(one, leaked(one))
    levels = list(dict.fromkeys(round(most) for most in seen))
    assert levels == [14, 28, 90]  # 56 is above a quarter of 128; the highest is 64 times root 2


def test_what_is_fine_already_keeps_its_frequencies_and_its_best() -> None:
    attack = several(2)
    attack.coarse[0], attack.best_objective = False, torch.tensor([1.0, 2.0])
    attack.focus(14, 2.0)
    assert attack.sharpness.tolist() == [POOL, 2.0]
    assert attack.best_objective.tolist() == [1.0, math.inf]  # the second's was of another image
    noise = torch.randn(2, 1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).double()
    shown = attack.spectrum.coefficients(attack.pixels(noise) - attack.middle).abs() > 1e-9
    assert shown[0].all()
    assert float(attack.spectrum.frequency[shown[1, 0, 0]].max()) <= 14


def test_maxima_sharpen_while_frequencies_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(attack="spectral:iterations=1", network="resnet18", resolution=112, steps=6, dtype="float32")
    seen, begin = list[tuple[float, float]](), Spectral.on_train_batch_start

    def watched(attack: Spectral, batch: Leak, step: int) -> None:
        begin(attack, batch, step)
        shown = attack.spectrum.frequency[attack.passband[0, 0, 0] > 0]
        seen.append((round(float(shown.max())), float(attack.sharpness[0])))

    monkeypatch.setattr(Spectral, "on_train_batch_start", watched)
    fitted(one, leaked(one))
    assert seen == [(14, 1.0), (28, 1.0), (78, 1.0), (78, 2.0), (78, 4.0), (78, 4.0)]  # 55.5 of both axes


def test_a_traced_closure_takes_the_sharpness_as_it_is_at_the_call() -> None:
    one = case(attack="spectral", network="resnet18", resolution=64)
    attack = trial.attack_on([one], network_of(one))
    grey, labels, leak = attack.example(leaked(one))
    images = torch.rand(grey.shape, generator=torch.Generator().manual_seed(0)).double()
    assert leak.buffers[SHARPNESS].tolist() == [POOL]
    traced = attack.closure.trace(images, labels, leak)
    softer = leak._replace(buffers={**leak.buffers, SHARPNESS: torch.tensor([1.0]).double()})
    sharp, soft = (attack.closure(images, labels, some).objective for some in (leak, softer))
    assert abs(soft - sharp) > 1e-5
    torch.testing.assert_close(traced(*attack.closure.flat(images, labels, softer))[0], soft)


def test_a_small_image_is_sought_as_a_whole() -> None:
    one = case(attack="spectral:iterations=1", network="resnet18", resolution=55, steps=1)
    attack = fitted(one, leaked(one))
    assert isinstance(attack, Spectral)
    assert bool(attack.passband.all())
    assert attack.sharpness.tolist() == [POOL]
