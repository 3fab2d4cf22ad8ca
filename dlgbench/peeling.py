"""Images in closed form, layer by layer from the head down: Zhu and Blaschko 2021, "R-GAP".

Where a network is a chain of convolutions, linear layers and activations that have an inverse, the
input of a layer solves *linear* equations, once its output and the loss's gradient there are known:
its own forward equations, and those of the leaked gradient of its weights (section 3.2).  A rectified unit
that is dead has no forward equation, but it is an input of the next layer that is known to be 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.grad import conv2d_input

from dlgbench import continuation, inversion, leastsquares, newton, residual
from dlgbench.batchnorm import BatchNorm2d
from dlgbench.convolution import Conv2d
from dlgbench.leak import Leak, Tensors
from dlgbench.prepare import ACTIVATIONS, Network
from dlgbench.spectrum import Spectrum

LARGEST = 4096
"""Unknowns of a layer that are solved for: its equations are written out, in a gigabyte for so many."""
EDGE = 1e-12
"""What a bounded activation keeps from its bounds at least, where its inverse is infinite."""
DEAD = 1e-5
"""A rectified activation below this share of the largest is taken for 0: its input is not known."""
MISFIT = 1e-2
"""A layer's relative error beyond which its leak is no gradient of any input, but noisy or rounded: what lies
below would be solved for in vain.  Measured on lenet_dlg, float32: at most 1e-5 of true gradients."""
ENOUGH = 0.5
"""Features that an image is sought from, as a share of its pixels: fewer show none."""

Activation = Callable[[Tensor], Tensor]
Equations = Callable[[Tensor], Tensor]
Fill = Callable[[Equations, Tensor, torch.Size], Tensor]
INVERSES: dict[Activation, Activation] = {
    ACTIVATIONS["sigmoid"]: lambda outputs: torch.logit(outputs, EDGE),
    ACTIVATIONS["tanh"]: lambda outputs: torch.atanh(outputs.clamp(EDGE - 1, 1 - EDGE)),
    ACTIVATIONS["softplus"]: lambda outputs: torch.special.expm1(outputs.clamp_min(EDGE)).log(),
    ACTIVATIONS["relu"]: lambda outputs: outputs.clamp_min(0),
}


class Layer(NamedTuple):
    """A layer with weights; shapes without the batch's dimension, the output's before the activation."""

    name: str
    module: Conv2d | nn.Linear
    inputs: torch.Size
    outputs: torch.Size
    activation: Activation | None


class Outputs(NamedTuple):
    """What is known where a layer ends: its output, which entries of it, and the loss's gradient there."""

    value: Tensor
    known: Tensor
    slope: Tensor


def peel(network: Network, leak: Leak, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """Which cases can be solved for, each with its images ``(image, channel, height, width)`` in [0, 1].

    ``shape`` is that of a case's images, which are in the order of their labels.  What lies below the
    lowest layer of a chain that can be inverted is solved for as a whole if the image is small enough, and
    alone.  Else the layers of a residual network are, and the images are those that they are computed on.
    Where ReLU leaves the equations underdetermined, images are filled smoothly.  Computed in float64; what
    the leak was rounded to is amplified from layer to layer; where it is too much, no more are solved.
    """
    if f"{network.head}.bias" not in leak.gradients:
        return
    trunk, layers = chain(network, shape)
    small = shape[0] == 1 and (trunk is None or math.prod(shape) <= _solver(trunk).LARGEST)
    solve = partial(_peel, trunk, layers) if layers and small else _descend
    for case in range(len(leak.gradients[f"{network.head}.bias"])):
        images = solve(network, leak.row(case), shape)
        if images is not None and images.isfinite().all():
            yield case, images.to(network.mean).clamp(0, 1)


def _descend(network: Network, leak: Leak, shape: tuple[int, ...]) -> Tensor | None:
    """One case's images from what can be told of a residual network's layers; None where it is too little.

    Their labels are the classes whose logits the loss pulls up: the slope of the features is that of the
    logits, ``p - y``, times the head's weight.
    """
    assert isinstance(network.body, fx.GraphModule)
    descent = residual.Descent(network.body, _exactly(leak))
    told = sum(descent.values[node].numel() for node in inversion.frontier(network.body, descent.values))
    if told < ENOUGH * math.prod(shape):
        return None
    labels = (descent.features @ leak.weights[f"{network.head}.weight"].double().T).argmin(1)
    return inversion.invert(network, leak, descent.values, shape)[labels.argsort(stable=True)]


def _exactly(leak: Leak) -> Leak:
    """The same in float64."""
    return Leak(*({name: tensor.double() for name, tensor in part.items()} for part in leak))


def _peel(
    trunk: fx.GraphModule | None,
    layers: Sequence[Layer],
    network: Network,
    leak: Leak,
    shape: tuple[int, ...],
) -> Tensor:
    """One case's image, layer by layer."""
    weights, _, gradients = _exactly(leak)
    slope = gradients[f"{layers[-1].name}.bias"]  # of one image, that is the loss's gradient in the logits
    outputs = Outputs(slope, torch.ones_like(slope, dtype=torch.bool), slope)
    for layer, below in zip(reversed(layers), [*reversed(layers[:-1]), None], strict=True):
        if isinstance(layer.module, nn.Linear):
            inputs, slope = _linear(layer, weights, gradients[f"{layer.name}.weight"], outputs)
        else:
            fill = _rectified if below and below.activation is ACTIVATIONS["relu"] else _smooth
            inputs, slope = _convolution(layer, weights, gradients[f"{layer.name}.weight"], outputs, fill)
        if not inputs.isfinite().all():
            return torch.full(shape, torch.nan).to(inputs)
        if below is not None:
            outputs = _undo(below.activation, inputs.view(below.outputs), slope.view(below.outputs))
    if trunk is not None:
        below_it = {f"body.{name}": name for name, _ in trunk.named_parameters()}
        weights, gradients = ({below_it[n]: part[n] for n in below_it} for part in (weights, gradients))
        inputs = _solver(trunk).solve(newton.Segment(trunk, weights, gradients, inputs, slope), shape)
    return inputs.view(shape) * network.std + network.mean


def _solver(trunk: fx.GraphModule) -> ModuleType:
    """By what an image is found below the chain.  What is normalised is too deep for a continuation."""
    rectified = any(node.target is ACTIVATIONS["relu"] for node in trunk.graph.nodes)
    normalised = any(isinstance(layer, nn.BatchNorm2d | BatchNorm2d) for layer in trunk.modules())
    return continuation if rectified and not normalised else newton


def chain(network: Network, shape: tuple[int, ...]) -> tuple[fx.GraphModule | None, list[Layer]]:
    """The layers above the lowest that can be inverted, bottom first, and the network below them if any."""
    body = network.body
    assert isinstance(body, fx.GraphModule)
    ShapeProp(body).propagate(torch.zeros(shape).to(network.mean))
    (node,) = (node for node in body.graph.nodes if node.op == "output")
    below = node.all_input_nodes[0]
    layers: list[Layer] = []
    activation: Activation | None = None
    while len(node.all_input_nodes) == 1 and len(node.all_input_nodes[0].users) == 1:
        node = node.all_input_nodes[0]
        if node.op == "placeholder":
            return None, layers
        module = body.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Conv2d | nn.Linear) and _size(node.all_input_nodes[0]).numel() <= LARGEST:
            (below,) = node.all_input_nodes
            layers.insert(0, Layer(f"body.{node.target}", module, _size(below), _size(node), activation))
            activation = None
        elif node.target in INVERSES and activation is None:
            activation = node.target
        elif not isinstance(module, nn.Flatten | nn.Identity) and node.target is not torch.flatten:
            break
    return inversion.trunk(body, [below]), layers


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


def _linear(layer: Layer, weights: Tensors, gradient: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """A linear layer's input, read off the gradient ``slope ⊗ input`` of its weight, and the slope there."""
    slope = outputs.slope
    return slope @ gradient / slope.square().sum(), slope @ weights[f"{layer.name}.weight"]


def _convolution(
    layer: Layer, weights: Tensors, gradient: Tensor, outputs: Outputs, fill: Fill
) -> tuple[Tensor, Tensor]:
    """A convolution's input, where the equations leave it open as ``fill`` has it, and the slope there."""
    assert isinstance(layer.module, Conv2d)
    weight, bias = weights[f"{layer.name}.weight"], weights.get(f"{layer.name}.bias")
    stride, padding = layer.module.stride, cast(tuple[int, int], layer.module.padding)
    forward = outputs.value if bias is None else outputs.value - bias[:, None, None]

    def equations(images: Tensor) -> Tensor:
        """Both kinds for inputs ``(image, channel, height, width)``, one row an image."""
        ahead = F.conv2d(images, weight, None, stride, padding)[:, outputs.known]
        planes = images.flatten(0, 1)[:, None]  # the gradient is a convolution with the slope, dilated
        whole = F.conv2d(planes, outputs.slope[:, None], padding=padding, dilation=stride)
        ours = whole[..., : weight.shape[2], : weight.shape[3]]
        ours = ours.reshape(*images.shape[:2], *ours.shape[1:]).transpose(1, 2)
        return torch.cat([ahead, ours.flatten(1)], 1)

    wanted = torch.cat([forward[outputs.known], gradient.flatten()])
    found = fill(equations, wanted, layer.inputs)
    misfit = (equations(found.view(1, *layer.inputs))[0] - wanted).norm() / wanted.norm()
    found = torch.where(misfit > MISFIT, torch.nan, found)
    shape = (1, *layer.inputs)
    slope = conv2d_input(shape, weight, outputs.slope[None], stride, padding)  # type: ignore[no-untyped-call]
    return found, slope[0]


def _smooth(equations: Equations, wanted: Tensor, shape: torch.Size) -> Tensor:
    """The solution that is least in the spectrum's units, about grey."""
    spectrum = Spectrum(shape, wanted)
    grey = torch.full((1, *shape), 0.5).to(wanted)
    basis = spectrum.images(_basis(shape, wanted))
    found = leastsquares.solve(equations(basis).T, wanted - equations(grey)[0])
    return grey[0] + spectrum.images(found.view(shape))


def _rectified(equations: Equations, wanted: Tensor, shape: torch.Size) -> Tensor:
    """The solution without negative entries: most are 0, which makes up for what equations are missing."""
    return leastsquares.solve_nonnegative(equations(_basis(shape, wanted)).T, wanted).view(shape)


def _basis(shape: torch.Size, like: Tensor) -> Tensor:
    """Every unit vector as an input, ``(number, channel, height, width)``."""
    return torch.eye(shape.numel()).to(like).view(-1, *shape)
