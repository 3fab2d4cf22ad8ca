"""What is particular to our own attack."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dlgbench.benchmarks.textbook import model
from torch import Tensor

from dlgbench import trial
from dlgbench.attacks.spectral import Spectral
from dlgbench.closures import Values
from dlgbench.leak import Leak
from dlgbench.metrics import psnr
from dlgbench.spectrum import CONTRAST
from dlgbench.victims import network_of, secret_of

from .clients import PHOTOS, case, error, fitted, leaked, several


def test_spectral_weighs_every_layer_by_its_own_gradient() -> None:
    one = case(attack="spectral")
    leak, network = leaked(one), network_of(one)
    attack = trial.attack_on([one], network)
    image, label = torch.rand(1, 3, 32, 32).double(), F.one_hot(torch.tensor([5]), 100).double()
    body = model("lenet_dlg", list(network.parameters()))
    ours = torch.autograd.grad(F.cross_entropy(body(image), label), list(body.parameters()))
    theirs = [gradient[0] for gradient in leak.gradients.values()]
    terms = [float((a - b).norm() / b.norm()) ** 2 for a, b in zip(ours, theirs, strict=True) if b.dim() > 1]
    logits = 1e4 * (label - 1)
    assert float(attack.distance(image, logits, leak.row(0))) == pytest.approx(sum(terms) / len(terms))


def test_a_layer_without_a_gradient_weighs_nothing() -> None:
    one = case(attack="spectral")
    leak = leaked(one)
    silent = {n: g * 0 if n == "body.2.weight" else g for n, g in leak.gradients.items()}
    attack = trial.attack_on([one], network_of(one))
    image, label = secret_of(one, PHOTOS).images[0] / 2, torch.zeros(1, 100).double()
    quiet = attack.distance(image, label, leak._replace(gradients=silent).row(0))
    ours = attack.gradients(image, label.softmax(-1), leak.row(0))["body.2.weight"]
    theirs = leak.gradients["body.2.weight"][0]
    missing = (ours - theirs).square().sum() / theirs.square().sum() / 4  # one of four layers
    assert float(quiet) == pytest.approx(float(attack.distance(image, label, leak.row(0)) - missing))


def test_spectral_goes_on_where_the_objective_is_small() -> None:
    one = case(attack="spectral", network="lenet5", steps=40, image=5, dtype="float32")  # a pale photo
    attack, truth = fitted(one, leaked(one)), secret_of(one, PHOTOS)
    assert float(psnr(torch.tensor(error(attack.result.images[0], truth.images[0])))) > 20


def test_a_start_that_was_solved_for_must_explain_the_gradient() -> None:
    """Noise that a closed form amplifies makes it worse than grey, and only the gradient tells."""
    one = case(attack="spectral", defense="noise:std=0.1")
    attack, grey = trial.attack_on([one], network_of(one)), trial.attack_on([one], network_of(one))
    with torch.no_grad():
        attack.look(leaked(one))
    assert torch.equal(attack.dummy_images, grey.dummy_images)
    with torch.no_grad():
        attack.look(leaked(case(attack="spectral")))
    assert not torch.equal(attack.dummy_images, grey.dummy_images)


@pytest.mark.parametrize(("network", "batch", "resolution"), [("resnet18", 1, 64), ("inception_v3", 2, 299)])
def test_layers_count_that_the_first_head_is_computed_by(network: str, batch: int, resolution: int) -> None:
    one = case(attack="spectral", network=network, batch=batch, resolution=resolution, dtype="float32")
    attack = trial.attack_on([one], network_of(one))
    assert isinstance(attack, Spectral)
    ghost = copy.deepcopy(attack.network).to("meta").requires_grad_()
    weights = dict(ghost.named_parameters())
    logits = ghost(torch.empty(batch, 3, resolution, resolution, device="meta"))[0]
    slopes = torch.autograd.grad(logits.sum(), list(weights.values()), allow_unused=True)
    used = {name for name, slope in zip(weights, slopes, strict=True) if slope is not None}
    assert attack.main == used
    assert (used == weights.keys()) is (network == "resnet18")


def noisy(count: int) -> Spectral:
    """Cases of 128 px in the middle of their descent, at a photo with noise."""
    attack = several(count)
    attack.configure_optimizers()
    images = secret_of(case(network="resnet18", resolution=128), PHOTOS).images
    noise = 0.04 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        attack.dummy_images[:] = attack.spectrum.coefficients((images + noise - attack.middle) / CONTRAST)
    attack.best_objective[:] = 0.01
    return attack


def test_smoothing_brings_what_is_noisy_nearer_to_the_photo() -> None:
    attack = noisy(1)
    truth = secret_of(case(network="resnet18", resolution=128), PHOTOS).images
    before = error(attack.pixels(attack.dummy_images.detach()), truth)
    attack.smooth()
    assert error(attack.pixels(attack.dummy_images.detach()), truth) < 0.8 * before


def test_smoothing_does_not_ask_how_strong_the_contrast_is() -> None:
    attack, pale = noisy(1), noisy(1)
    with torch.no_grad():
        pale.dummy_images.div_(8)
    attack.smooth()
    pale.smooth()
    torch.testing.assert_close(8 * pale.dummy_images, attack.dummy_images)


def test_the_nearer_the_gradient_the_less_is_smoothed() -> None:
    attack = noisy(3)
    attack.best_objective = torch.tensor([1.0, 0.04, 1e-6])
    before = attack.dummy_images.detach().clone()
    attack.smooth()
    moved = (attack.dummy_images - before).flatten(1).norm(dim=1).tolist()
    assert moved[0] == pytest.approx(moved[1], rel=1e-12)  # as much as there ever is
    assert moved[2] < moved[1] / 10


def test_what_is_solved_done_or_not_shown_is_not_smoothed() -> None:
    attack = noisy(3)
    attack.coarse[0] = attack.active[1] = False
    attack.focus(14, 2.0)
    attack.best_objective[:] = 0.01
    before = attack.dummy_images.detach().clone()
    attack.smooth()
    assert torch.equal(attack.dummy_images[:2], before[:2])
    moved = (attack.dummy_images[2] != before[2])[0, 0]
    assert float(attack.spectrum.frequency[moved].max()) <= 14
    assert moved[attack.spectrum.frequency <= 14].all()


def test_what_is_returned_is_without_noise_unless_it_was_solved() -> None:
    attack = noisy(2)
    attack.noisy[1], attack.hidden = False, False  # what contrast is guessed is another question
    found = attack.dummy_images.detach()
    clean = attack.reconstructed(found)
    as_it_is = attack.matched(found)
    truth = secret_of(case(network="resnet18", resolution=128), PHOTOS).images[0]
    assert error(clean[0], truth) < 0.8 * error(as_it_is[0], truth)
    torch.testing.assert_close(clean[1], as_it_is[1])


@pytest.mark.parametrize("resolution", [48, 64])
def test_distances_are_of_what_was_matched_to_the_client_s_own_gradient(resolution: int) -> None:
    one = case(attack="spectral:iterations=2", network="resnet18", resolution=resolution, steps=6)
    leak = leaked(one)
    found = fitted(one, leak)
    assert isinstance(found, Spectral)
    matched = found.shown(found.pixels(found.best_images))
    assert torch.equal(matched, found.result.images) is (resolution == 48)  # where no noise is taken out
    ours = found.gradients(matched[0], found.result.labels[0], leak.row(0))
    theirs = {name: gradient[0] for name, gradient in leak.gradients.items()}
    squares = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    sizes = sum(gradient.square().sum() for gradient in theirs.values())
    assert float(found.result.relative[0]) == pytest.approx(float(squares / sizes), rel=1e-9)


def test_smoothing_begins_every_stage_and_goes_on_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, smooth = list[int](), Spectral.smooth

    def watched(attack: Spectral) -> None:
        assert attack.best_objective.isfinite().all()  # of the stage that ends
        steps.append(len(attack.trace))
        smooth(attack)

    monkeypatch.setattr(Spectral, "smooth", watched)
    for resolution in (48, 64):
        one = case(attack="spectral:iterations=1", network="resnet18", resolution=resolution, steps=12)
        fitted(one, leaked(one))
    assert steps == [2, 4, 6, 8, 10]


def test_case_by_case_what_is_not_solved_is_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    attack, sought = several(3), list[int]()
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).double()
    monkeypatch.setattr("dlgbench.attacks.spectral.peel", lambda *told: [(1, images)])

    def descend(attack: Spectral, leak: Leak, found: Tensor, rows: list[int]) -> None:
        sought.extend(rows)
        found[2] = attack.coefficients(images)

    monkeypatch.setattr(Spectral, "descend", descend)
    objectives = iter((torch.tensor([3.0, 3.0, 3.0]), torch.tensor([3.0, 2.0, 2.0])))  # grey, and found
    monkeypatch.setattr(
        attack, "evaluate", lambda *told: Values(next(objectives), torch.empty(0), torch.empty(0))
    )
    with torch.no_grad():
        attack.solve(Leak({}, {}, {}))
    assert sought == [0, 2]
    assert attack.coarse.tolist() == [True, False, False]
    assert attack.noisy.tolist() == [True, False, True]  # what was solved for is exact
    for row in (1, 2):
        torch.testing.assert_close(attack.pixels(attack.dummy_images.detach())[row], images)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_what_was_solved_is_not_blurred_by_beginning_coarse() -> None:
    relu = "resnet18:activation=relu,batchnorm=eval"
    one = case(attack="spectral", network=relu, resolution=64, image=0, steps=1, dtype="float32")
    attack = fitted(one, leaked(one))
    assert isinstance(attack, Spectral)
    assert attack.passband.all()  # every frequency of it is shown, in the only step
    error = (attack.result.images[0].clamp(0, 1) - secret_of(one, PHOTOS).images[0]).square().mean()
    assert float(psnr(error)) > 20
