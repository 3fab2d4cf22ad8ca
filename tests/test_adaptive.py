"""The attack that knows the defence, against leaks of which the answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dlgbench import trial
from dlgbench.attacks.adaptive import Adaptive
from dlgbench.attacks.base import Attack
from dlgbench.attacks.spectral import Spectral
from dlgbench.case import Case
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES
from dlgbench.spectrum import CONTRAST
from dlgbench.victims import leak_of, network_of, secret_of

from .clients import case

DIGITS = DATASETS.make(DATASETS.spec("digits"), None)
MNIST = DATASETS.make(DATASETS.spec("mnist_sample"), None)
ONE = case(dataset="digits", attack="adaptive", channels=1, classes=10, resolution=16, steps=12)
FORESEEN = [
    "prune", "topk", "clip:bound=0.1", "local:steps=2", "soteria", "dpsgd:multiplier=1e-12,bound=0.1",
    "dropout", "precode:units=16",
]  # fmt: skip


def defended(text: str, one: Case = ONE) -> Case:
    return replace(one, defense=DEFENSES.spec(text))


def at_the_truth(one: Case) -> tuple[Attack, float]:
    """An attack, and its objective for the private images and labels."""
    network, truth = network_of(one), secret_of(one, DIGITS)
    leak = leak_of(one, network, truth).row(0)
    attack = trial.attack_on([one], network)
    labels = 1e4 * (F.one_hot(truth.labels[0], one.classes).double() - 1)
    return attack, float(attack.distance(truth.images[0], labels, leak))


@pytest.mark.parametrize("text", FORESEEN)
def test_at_the_truth_nothing_is_left_but_the_prior(text: str) -> None:
    attack, there = at_the_truth(defended(text))
    assert isinstance(attack, Adaptive)
    images = secret_of(ONE, DIGITS).images[0]
    prior = attack.spectrum.coefficients((images - 0.5) / CONTRAST).square().mean()
    assert there == pytest.approx(float(prior), rel=1e-4)


@pytest.mark.parametrize("text", FORESEEN)
def test_who_does_not_know_the_defence_finds_the_truth_unlikely(text: str) -> None:
    attack, there = at_the_truth(replace(defended(text), attack=ATTACKS.spec("spectral")))
    assert isinstance(attack, Spectral)
    assert not isinstance(attack, Adaptive)
    assert there > 0.01


@pytest.mark.parametrize(
    "text",
    [
        "noise:std=0.01",
        "laplace:scale=0.01",
        "dpsgd:multiplier=0.5",
        "int8",
        "noise:std=0.1,rounds=100",
        "laplace:scale=0.1,rounds=100",
    ],
)
def test_the_misfit_at_the_truth_is_as_large_as_chance_makes_it(text: str) -> None:
    attack, there = at_the_truth(defended(text))
    assert isinstance(attack, Adaptive)
    images = secret_of(ONE, DIGITS).images[0]
    prior = attack.spectrum.coefficients((images - 0.5) / CONTRAST).square().mean()
    entries = sum(weight.numel() for weight in network_of(ONE).parameters() if weight.dim() > 1)
    misfit = (there - float(prior)) * images.numel() / entries  # chi squared over its degrees of freedom
    assert 0.8 < misfit < 1.2


@pytest.mark.parametrize("text", DEFENSES.entries)
def test_every_defence_can_be_attacked_by_one_who_knows_it(text: str) -> None:
    one = replace(defended(text), batch=9 if text in ("secagg", "mixup", "ckks") else 1, steps=1)
    (trial_of,) = trial.run([one], DIGITS, trial.Setup(accelerator="cpu"), lambda *progress: None)
    record = trial_of[0]
    assert record.status == "done", record.reason
    assert record.objective is not None
    assert record.images


def psnr(attack: str, text: str) -> float:
    one = replace(defended(text), attack=ATTACKS.spec(attack), steps=20)
    ((record, _),) = trial.run([one], DIGITS, trial.Setup(accelerator="cpu"), lambda *progress: None)
    return float(record.images[0]["psnr"])


@pytest.mark.parametrize("text", ["soteria:share=0.5", "prune:share=0.9", "noise:std=0.003"])
def test_knowing_the_defence_helps(text: str) -> None:
    assert psnr("adaptive", text) > psnr("spectral", text) + 3


def test_its_draws_are_not_known() -> None:
    network, truth = network_of(ONE), secret_of(ONE, DIGITS)
    noisy = defended("noise:std=0.1")
    attack = trial.attack_on([noisy], network)
    leak = leak_of(noisy, network, truth).row(0)
    labels = 1e4 * (F.one_hot(truth.labels[0], ONE.classes).double() - 1)
    twice = [float(attack.distance(truth.images[0], labels, leak)) for _ in range(2)]
    assert twice[0] == twice[1]
    assert torch.tensor(twice[0]) > 1


def test_a_plain_batch_hides_no_more_than_its_secure_sum() -> None:
    one = case(
        network="lenet5", dataset="mnist_sample", attack="adaptive", channels=1, classes=10, batch=8,
        steps=5, dtype="float32",
    )  # fmt: skip
    for text in ("none", "secagg"):
        ((record, _),) = trial.run(
            [defended(text, one)], MNIST, trial.Setup(accelerator="cpu"), lambda *progress: None
        )
        assert min(image["psnr"] for image in record.images) > 20
