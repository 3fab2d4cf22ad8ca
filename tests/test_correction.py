"""What `spectral` does about the softened network's errors: defect correction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlgbench import trial
from dlgbench.attacks.spectral import Spectral
from dlgbench.leak import Leak, stack
from dlgbench.spectrum import CONTRAST
from dlgbench.victims import network_of, secret_of

from .clients import PHOTOS, case, fitted, leaked

SIZE = 64


def at_the_truth(network: str = "resnet18", count: int = 1) -> tuple[Spectral, Leak]:
    """Cases that have found what the clients hide, labels too, and what these share."""
    cases = [case(attack="spectral", network=network, resolution=SIZE, image=i) for i in range(count)]
    attack = trial.attack_on(cases, network_of(cases[0]))
    assert isinstance(attack, Spectral)
    attack.configure_optimizers()
    leaks = [leaked(one) for one in cases]
    leak = stack(leaks)
    with torch.no_grad():
        for row, one in enumerate(cases):
            secret = secret_of(one, PHOTOS)
            found = attack.spectrum.coefficients((secret.images - attack.middle) / CONTRAST)
            attack.dummy_images[row] = found[0]
            attack.dummy_labels[row] = -1e4
            attack.dummy_labels[row, 0, int(secret.labels[0, 0])] = 1e4
    return attack, leak


def objectives(attack: Spectral, leak: Leak) -> Tensor:
    return attack.evaluate(attack.dummy_images.detach(), attack.dummy_labels.detach(), leak).objective


@pytest.mark.parametrize("network", ["resnet18", "resnet18:batchnorm=shared"])
def test_the_truth_is_a_minimum_of_what_is_corrected_there(network: str) -> None:
    attack, leak = at_the_truth(network)
    before = float(objectives(attack, leak)[0])
    attack.correct(leak)
    assert before > 1e-3
    assert float(objectives(attack, leak)[0]) < 1e-20


def test_a_gradient_that_was_multiplied_is_corrected_by_as_much() -> None:
    attack, leak = at_the_truth()
    clipped = leak._replace(gradients={name: 0.01 * part for name, part in leak.gradients.items()})
    with torch.no_grad():
        attack.find_factors(clipped)
    attack.correct(clipped)
    assert attack.factors is not None
    assert float(attack.factors[0]) == pytest.approx(0.01, rel=1e-6)
    assert float(objectives(attack, clipped)[0]) < 1e-12


def test_what_is_solved_or_done_is_matched_as_it_was() -> None:
    attack, leak = at_the_truth(count=3)
    before = objectives(attack, leak)
    attack.best_objective[:] = 7.0
    attack.coarse[0] = attack.active[1] = False
    attack.correct(leak)
    attack.active[1] = True
    assert objectives(attack, leak)[:2].tolist() == before[:2].tolist()
    assert float(objectives(attack, leak)[2]) < 1e-20
    assert attack.best_objective.tolist() == [7.0, 7.0, torch.inf]
    assert attack.closures.tolist() == [0, 0, 1]


def test_every_stage_but_the_first_begins_with_a_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, correct = list[int](), Spectral.correct

    def watched(attack: Spectral, leak: Leak) -> None:
        steps.append(len(attack.trace))
        correct(attack, leak)

    monkeypatch.setattr(Spectral, "correct", watched)
    for resolution in (48, SIZE):
        one = case(attack="spectral:iterations=1", network="resnet18", resolution=resolution, steps=12)
        fitted(one, leaked(one))
    assert steps == [2, 4, 6, 8, 10]
