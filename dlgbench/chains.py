"""Chains of layers in closed form, from the head down: Zhu and Blaschko 2021, "R-GAP".

In a chain of convolutions, linear layers and activations that have an inverse, the input of a layer solves
*linear* equations, once its output and the loss's gradient there are known: its own forward equations, and
those of the leaked gradient of its weights (section 3.2).  A rectified unit that is dead has no forward
equation, but it is an input of the next layer that is known to be 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from dlgbench import leastsquares
from dlgbench.convolution import Conv2d, input_slope
from dlgbench.equations import Equations
from dlgbench.leak import Leak
from dlgbench.prepare import ACTIVATIONS, Network
from dlgbench.spectrum import Spectrum

LARGEST = 4096
"""Unknowns of a layer that are solved for, in a gigabyte for so many."""
EDGE = 1e-12
"""What a bounded activation keeps from its bounds at least, where its inverse is infinite."""
DEAD = 1e-5
"""A rectified activation below this share of the largest is taken for 0: its input is not known."""
MISFIT = 1e-2
"""A layer's relative error beyond which its leak is no gradient of any input, but noisy or rounded: what lies
below would be solved for in vain.  Measured on lenet_dlg, float32: at most 1e-5 of true gradients."""

Activation = Callable[[Tensor], Tensor]
Fill = Callable[[Equations, Tensor, torch.Size], Tensor | None]
INVERSES: dict[Activation, Activation] = {
    ACTIVATIONS["sigmoid"]: lambda outputs: torch.logit(outputs, EDGE),
    ACTIVATIONS["tanh"]: lambda outputs: torch.atanh(outputs.clamp(EDGE - 1, 1 - EDGE)),
    ACTIVATIONS["softplus"]: lambda outputs: torch.special.expm1(outputs.clamp_min(EDGE)).log(),
    ACTIVATIONS["relu"]: lambda outputs: outputs.clamp_min(0),
}


class Layer(NamedTuple):
    """A layer with weights and where its input comes from; shapes without the batch's dimension, the output's
    before the activation."""

    name: str
    module: Conv2d | nn.Linear
    source: fx.Node
    inputs: torch.Size
    outputs: torch.Size
    activation: Activation | None


class Outputs(NamedTuple):
    """What is known where a layer ends: its output, which entries of it, and the loss's gradient there."""

    value: Tensor
    known: Tensor
    slope: Tensor


class Inputs(NamedTuple):
    """What a layer sees, as solved for, and the loss's gradient there."""

    layer: Layer
    value: Tensor
    slope: Tensor


def chain(network: Network, shape: tuple[int, ...]) -> list[Layer]:
    """The layers above the lowest that can be inverted, bottom first."""
    body = network.body
    assert isinstance(body, fx.GraphModule)
    ShapeProp(body).propagate(torch.zeros(shape).to(network.mean))
    (node,) = (node for node in body.graph.nodes if node.op == "output")
    layers: list[Layer] = []
    activation: Activation | None = None
    while len(node.all_input_nodes) == 1 and len(node.all_input_nodes[0].users) == 1:
        (node,) = node.all_input_nodes
        if node.op == "placeholder":
            break
        module = body.get_submodule(node.target) if node.op == "call_module" else None
        if _solvable(module, _size(node.all_input_nodes[0])):
            (below,) = node.all_input_nodes
            layers.insert(
                0, Layer(f"body.{node.target}", module, below, _size(below), _size(node), activation)
            )
            activation = None
        elif node.target in INVERSES and activation is None:
            activation = node.target
        elif not isinstance(module, nn.Flatten | nn.Identity) and node.target is not torch.flatten:
            break
    return layers


def _solvable(module: nn.Module | None, inputs: torch.Size) -> TypeGuard[Conv2d | nn.Linear]:
    """Whether it is such a layer, and sees all of its input at once if it is linear."""
    linear = type(module) is nn.Linear and len(inputs) == 1
    return (linear or isinstance(module, Conv2d)) and inputs.numel() <= LARGEST


def solve(layers: Sequence[Layer], leak: Leak) -> Iterator[Inputs]:
    """What the ``layers`` of a chain see, from the head down, as far as their equations tell.

    ``leak`` is one case's, of one image, in float64.  Where it is no gradient of any image, the last value
    is not finite.
    """
    slope = leak.gradients[f"{layers[-1].name}.bias"]  # of one image, that is the loss's in the logits
    outputs = Outputs(slope, torch.ones_like(slope, dtype=torch.bool), slope)
    for layer, below in zip(reversed(layers), [*reversed(layers[:-1]), None], strict=True):
        fill = _rectified if below and below.activation is ACTIVATIONS["relu"] else _smooth
        inputs = _solved(layer, leak, outputs, fill)
        if inputs is None:
            return
        yield inputs
        if below is None or not inputs.value.isfinite().all():
            return
        outputs = _undo(below.activation, inputs.value.view(below.outputs), inputs.slope.view(below.outputs))


def _size(node: fx.Node) -> torch.Size:
    """The shape of what a node gives, without the batch's dimension."""
    size: torch.Size = node.meta["tensor_meta"].shape[1:]
    return size


def _undo(activation: Activation | None, values: Tensor, slope: Tensor) -> Outputs:
    """What is known before an activation, from its values and the loss's gradient behind it."""
    if activation is None:
        return Outputs(values, values.isfinite(), slope)
    known = values > DEAD * values.max() if activation is ACTIVATIONS["relu"] else values.isfinite()
    before = torch.where(known, INVERSES[activation](values), 0)
    with torch.enable_grad():
        leaf = before.requires_grad_()
        (slope,) = torch.autograd.grad(activation(leaf), leaf, slope)
    return Outputs(before.detach(), known, slope)


def _solved(layer: Layer, leak: Leak, outputs: Outputs, fill: Fill) -> Inputs | None:
    """What a layer sees; where a convolution's equations leave it open, as ``fill`` has it."""
    weight, gradient = (part[f"{layer.name}.weight"] for part in (leak.weights, leak.gradients))
    if isinstance(layer.module, nn.Linear):  # its weight's gradient is ``slope ⊗ input``
        slope = outputs.slope
        return Inputs(layer, slope @ gradient / slope.square().sum(), slope @ weight)
    bias = leak.weights.get(f"{layer.name}.bias")
    forward = outputs.value if bias is None else outputs.value - bias[:, None, None]
    equations = Equations(layer.module, weight, layer.inputs, outputs.known, outputs.slope)
    wanted = equations.wanted(forward, gradient)
    found = fill(equations, wanted, layer.inputs)
    if found is None:
        return None
    found = torch.where(equations.misfit(found, wanted) > MISFIT, torch.nan, found)
    slope = input_slope(layer.module, weight, outputs.slope[None], (1, *layer.inputs))
    return Inputs(layer, found.view(layer.inputs), slope[0])


def _smooth(equations: Equations, wanted: Tensor, shape: torch.Size) -> Tensor:
    """The solution that is least in the spectrum's units, about grey."""
    spectrum, grey = Spectrum(shape, wanted), torch.full_like(wanted[0], 0.5).expand(shape.numel())
    rest = wanted - equations.times(grey)
    return grey + leastsquares.solve(equations, rest, spectrum.covariance(), spectrum.covariance(-1))


def _rectified(equations: Equations, wanted: Tensor, shape: torch.Size) -> Tensor | None:
    """The one without negative entries: most are 0, which makes up for what equations are missing."""
    return leastsquares.solve_nonnegative(equations, wanted)
