"""Closed form: the known answer is the private image itself."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dlgbench import continuation, inversion, leastsquares, newton
from dlgbench.case import Case
from dlgbench.chains import chain
from dlgbench.datasets import Dataset
from dlgbench.metrics import mean_squared_error, psnr
from dlgbench.peeling import peel
from dlgbench.registry import DATASETS
from dlgbench.victims import leak_of, network_of, secret_of, trained_network_of

from .clients import PHOTOS, case, leaked

EVAL = "activation=relu,batchnorm=eval"


def fidelity(one: Case, data: Dataset = PHOTOS) -> float:
    """The PSNR of what is peeled, in dB."""
    network, secret = trained_network_of(one, data), secret_of(one, data)
    ((_, found),) = peel(network, leak_of(one, network, secret), one.shape)
    return float(psnr(mean_squared_error(found, secret.images[0])))


@pytest.mark.parametrize("options", ["", ":activation=tanh,init=default", ":activation=softplus"])
def test_an_invertible_chain_gives_the_image_to_rounding(options: str) -> None:
    assert fidelity(case(network=f"lenet_dlg{options}", image=1)) > 100


def test_saturated_units_cost_accuracy() -> None:
    assert fidelity(case(network="lenet_dlg:activation=tanh", image=1)) > 30  # measured: 42


def test_rounding_of_the_leak_is_what_limits_it() -> None:
    assert fidelity(case(network="lenet_dlg", image=6, dtype="float32")) > 60


@pytest.mark.parametrize("image", [1, 2, 5])
def test_relus_dead_units_are_zeros_of_the_next_layer(image: int) -> None:
    assert fidelity(case(network="lenet_dlg:activation=relu", image=image, dtype="float32")) > 20


@pytest.mark.parametrize("name", ["lenet5", "resnet18", "densenet121"])
def test_what_is_too_large_to_solve_is_left_alone(name: str) -> None:
    one = case(network=name, resolution=32 if name == "lenet5" else 64)
    network = network_of(one)
    assert not list(peel(network, leaked(one), one.shape))


def test_several_images_are_left_alone() -> None:
    one = case(network="lenet_dlg", batch=2)
    network = network_of(one)
    assert not list(peel(network, leaked(one), one.shape))


def test_two_heads_are_no_chain() -> None:
    one = case(network="inception_v3", batch=2, resolution=299)
    assert chain(network_of(one), one.shape) == []


@pytest.mark.parametrize("factor", [0, torch.nan, torch.inf])
def test_a_gradient_that_tells_nothing_is_solved_for_nothing(factor: float) -> None:
    one = case(network="lenet_dlg")
    network = network_of(one)
    leak = leaked(one)
    silent = {name: gradient * factor for name, gradient in leak.gradients.items()}
    assert not list(peel(network, leak._replace(gradients=silent), one.shape))


@pytest.mark.parametrize("defense", ["sign", "noise:std=0.01", "prune", "int8"])
def test_what_is_no_gradient_is_given_up_at_the_first_layer(
    defense: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[int] = []
    real = leastsquares.solve

    def solve(linear: leastsquares.Linear, wanted: Tensor, *shape: Tensor) -> Tensor:
        solved.append(len(wanted))
        return real(linear, wanted, *shape)

    monkeypatch.setattr(leastsquares, "solve", solve)
    one = case(network="lenet_dlg", defense=defense, dtype="float32")
    network = network_of(one)
    assert not list(peel(network, leaked(one), one.shape))
    assert len(solved) == 1
    plain = case(network="lenet_dlg", dtype="float32")
    assert len(list(peel(network, leaked(plain), one.shape))) == 1
    assert len(solved) == 4  # of its three convolutions


def test_pooled_layers_are_solved_together() -> None:
    """Three linear layers one by one; the convolutions below, with their pooling, by Gauss-Newton."""
    one = case(network="lenet5", image=2, channels=1, classes=10)
    layers = chain(network_of(one), one.shape)
    assert [layer.name for layer in layers] == ["body.7", "body.9", "body.11"]
    assert fidelity(one) > 60


@pytest.mark.parametrize(
    ("name", "image", "seed", "least"),
    [("lenet5", 7, 0, 50), ("lenet_dlg:activation=relu", 4, 2, 30)],  # measured: 67 and 42
)
def test_trained_clients_are_solved_for(name: str, image: int, seed: int, least: float) -> None:
    """Saturated units, where Gauss-Newton from grey climbs at once; ReLU where half of a layer stays open."""
    digits = DATASETS.make(DATASETS.spec("digits"), None)
    one = case(
        network=name, dataset="digits", epochs=30, image=image, seed=seed, channels=1, classes=10,
        dtype="float32",
    )  # fmt: skip
    assert fidelity(one, digits) > least


@pytest.mark.parametrize(
    ("name", "way"),
    [("lenet5", "newton"), ("lenet5:activation=relu", "continuation"), (f"resnet18:{EVAL}", "inversion")],
)
def test_what_lies_below_the_chain_has_its_own_way(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an image of a residual network is as small as a continuation allows."""
    taken = []
    for module, function in ((newton, "solve"), (continuation, "solve"), (inversion, "invert")):

        def grey(*arguments: Any, module: ModuleType = module, **others: Any) -> Tensor:
            taken.append(module.__name__)
            return torch.zeros(arguments[-1])

        monkeypatch.setattr(module, function, grey)
    one = case(network=name, channels=1 if way == "newton" else 3, resolution=32)
    assert list(peel(network_of(one), leaked(one), one.shape))
    assert taken == [f"dlgbench.{way}"]


def test_large_images_are_not_written_out() -> None:
    one = case(network="lenet_dlg", resolution=64)
    layers = chain(network_of(one), one.shape)
    assert [tuple(layer.inputs) for layer in layers] == [(12, 16, 16), (3072,)]


def test_a_chain_is_told_with_its_shapes_and_activations() -> None:
    layers = chain(network_of(case(network="lenet_dlg")), (1, 3, 32, 32))
    assert layers[0].source.op == "placeholder"
    assert [layer.name for layer in layers] == ["body.0", "body.2", "body.4", "body.7"]
    assert [tuple(layer.inputs) for layer in layers] == [(3, 32, 32), (12, 16, 16), (12, 8, 8), (768,)]
    assert [layer.activation for layer in layers] == [torch.sigmoid] * 3 + [None]
