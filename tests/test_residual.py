"""What is read off a gradient, against what the network computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dlgbench.case import Case
from dlgbench.chains import chain
from dlgbench.leak import Leak
from dlgbench.residual import Layers
from dlgbench.victims import network_of, secret_of

from .clients import PHOTOS, case, leaked

RELU = "resnet18:activation=relu,batchnorm=eval"


class Recorder(fx.Interpreter):
    """Runs a graph and remembers what every node gives."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__(body)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


def told(one: Case, leak: Leak | None = None) -> dict[str, Tensor]:
    """The layers that are read off, by the names of their nodes."""
    network = network_of(one)
    assert isinstance(network.body, fx.GraphModule)
    chain(network, one.shape)
    parts = [{n: t[0].double() for n, t in part.items()} for part in leak or leaked(one)]
    return {node.name: value for node, value in Layers(network.body, Leak(*parts)).values.items()}


def computed(one: Case) -> dict[str, Tensor]:
    network = network_of(one)
    assert isinstance(network.body, fx.GraphModule)
    recorder = Recorder(network.body)
    recorder.run(network.normalise(secret_of(one, PHOTOS).images[0]))
    return recorder.seen


@pytest.mark.parametrize("image", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_layer_of_a_small_photo_is_told_exactly(image: int, dtype: str) -> None:
    one = case(network=RELU, image=image, resolution=64, dtype=dtype)
    layers, truth = told(one), computed(one)
    assert {f"relu_{i}" for i in range(1, 16)} | {"maxpool"} == set(layers)
    errors = {name: float((layers[name] - truth[name]).norm() / truth[name].norm()) for name in layers}
    assert max(errors.values()) < (1e-5 if dtype == "float32" else 1e-12), errors


def test_the_smallest_living_units_are_told_from_rounding() -> None:
    """Some of this photo's are 1.6 to 2.8 times the lowest value: no fixed multiple of it parts the two."""
    one = case(network=RELU, image=3, resolution=224, preparation="crop", classes=1000, dtype="float32")
    layers, truth = told(one), computed(one)
    assert set(layers) == {f"relu_{i}" for i in range(5, 16)}  # below, too many positions for the equations
    errors = {name: float((layers[name] - truth[name]).norm() / truth[name].norm()) for name in layers}
    assert max(errors.values()) < 1e-4, errors  # where one is wrong, 1e-3 in the layer below


@pytest.mark.parametrize("images", [2, 3])
def test_layers_of_several_photos_come_apart(images: int) -> None:
    """In an order that the gradient does not tell."""
    one = case(network=RELU, image=0, batch=images, resolution=64, dtype="float32")
    layers, truth = told(one), computed(one)
    assert {"relu_15", "relu_12", "relu_9"} <= set(layers)
    for name in ("relu_15", "relu_12", "relu_9"):
        errors = torch.cdist(layers[name].flatten(1), truth[name].double().flatten(1)) / truth[name].norm()
        assert sorted(errors.argmin(1).tolist()) == list(range(images))
        assert float(errors.amin(1).max()) < 1e-4, name


def test_layers_that_gradients_do_not_determine_are_not_told() -> None:
    """The lowest blocks have 28 by 28 positions: more than nine taps of 64 kernels give equations."""
    one = case(network=RELU, image=0, resolution=112, dtype="float32")
    layers, truth = told(one), computed(one)
    assert "relu_5" in layers
    assert "relu_2" not in layers
    for name, layer in layers.items():
        assert float((layer - truth[name]).norm() / truth[name].norm()) < 1e-4, name


@pytest.mark.parametrize("defense", ["sign", "noise:std=0.01", "int8", "fp16"])
def test_what_is_no_gradient_tells_no_layer(defense: str) -> None:
    assert not told(case(network=RELU, resolution=64, defense=defense, dtype="float32"))


@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_a_gradient_of_nothing_tells_no_layer(factor: float) -> None:
    one = case(network=RELU, resolution=64, dtype="float32")
    leak = leaked(one)
    silent = {name: gradient * factor for name, gradient in leak.gradients.items()}
    assert not told(one, leak._replace(gradients=silent))


@pytest.mark.parametrize(
    "network",
    ["resnet18", "resnet18:activation=relu", "densenet121:activation=relu,batchnorm=eval"],
)
def test_other_networks_are_left_alone(network: str) -> None:
    assert not told(case(network=network, resolution=64, dtype="float32"))
