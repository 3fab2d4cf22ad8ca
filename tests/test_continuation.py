"""Rectified layers with pooling: the known answer is the private image itself."""

from __future__ import annotations

import pytest
import torch

from dlgbench import continuation
from dlgbench.case import Case
from dlgbench.metrics import mean_squared_error, psnr
from dlgbench.peeling import peel
from dlgbench.registry import DATASETS
from dlgbench.victims import leak_of, network_of, secret_of, trained_network_of

from .clients import PHOTOS, case, leaked

RELU = "lenet5:activation=relu"


def fidelity(one: Case) -> float:
    """The PSNR of what is solved for, in dB."""
    data = PHOTOS if one.dataset.name == "photos" else DATASETS.make(one.dataset, None)
    network, secret = trained_network_of(one, data), secret_of(one, data)
    ((_, found),) = peel(network, leak_of(one, network, secret), one.shape)
    return float(psnr(mean_squared_error(found, secret.images[0])))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_colour_photo_comes_out_where_units_die(dtype: str) -> None:
    assert fidelity(case(network=RELU, image=1, dtype=dtype)) > 24  # measured: 27; of mean colours 14


@pytest.mark.parametrize("epochs", [0, 10])
def test_so_does_a_digit_also_of_a_trained_client(epochs: int) -> None:
    """By descent alone none of eight did after thirty epochs: 10 dB in the median."""
    digit = case(network=RELU, dataset="digits", channels=1, classes=10, epochs=epochs, dtype="float32")
    assert fidelity(digit) > 25


def test_it_takes_the_bends_and_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same number of iterations with the narrowest bend only, or without the prior, less comes out."""
    one = case(network=RELU, image=1, dtype="float32")
    found = fidelity(one)
    for name, value in (("WIDEST", continuation.NARROWEST), ("PRIOR", 0.0)):
        with monkeypatch.context() as changed:
            changed.setattr(continuation, name, value)
            assert fidelity(one) < found - 2, name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_a_gradient_that_tells_nothing_is_solved_for_nothing(value: float) -> None:
    one = case(network=RELU)
    leak = leaked(one)
    silent = {name: torch.full_like(gradient, value) for name, gradient in leak.gradients.items()}
    assert not list(peel(network_of(one), leak._replace(gradients=silent), one.shape))


def test_a_single_layer_without_a_gradient_is_no_number() -> None:
    """As where all its units are dead: nothing is told, and nothing fails."""
    one = case(network=RELU)
    leak = leaked(one)
    dead = leak.gradients | {"body.0.weight": torch.zeros_like(leak.gradients["body.0.weight"])}
    assert not list(peel(network_of(one), leak._replace(gradients=dead), one.shape))
