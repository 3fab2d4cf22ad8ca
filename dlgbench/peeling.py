"""One image in closed form, layer by layer from the head down: Zhu and Blaschko 2021, "R-GAP".

Where a network is a chain of convolutions, linear layers and activations that have an inverse, the
input of a layer solves *linear* equations, once its output and the loss's gradient there are known:
its own forward equations, and those of the leaked gradient of its weights (section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from dlgbench.convolution import Conv2d
from dlgbench.leak import Leak, Tensors
from dlgbench.prepare import ACTIVATIONS, Network
from dlgbench.spectrum import Spectrum

LARGEST = 8192
"""Unknowns that are solved for: their equations are written out, and time grows with the third power."""
EDGE = 1e-12
"""What a bounded activation keeps from its bounds at least, where its inverse is infinite."""
DEAD = 1e-6
"""A rectified activation below this share of the largest is taken for 0: its input is not known."""
DAMPING, REFINEMENTS = 1e-11, 4
"""Tikhonov's term, in units of the mean eigenvalue, and steps of iterative refinement that undo it."""

Activation = Callable[[Tensor], Tensor]
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


def peel(network: Network, leak: Leak, shape: tuple[int, ...]) -> Tensor | None:
    """The private image ``(1, channel, height, width)`` of one case, or None if the network is no such chain.

    ``shape`` is the image's.  Where ReLU leaves the equations underdetermined, it is filled smoothly.
    Computed in float64; what the leak was rounded to is amplified from layer to layer.
    """
    layers = chain(network, shape)
    if not layers or f"{layers[-1].name}.bias" not in leak.gradients:
        return None
    weights, gradients = ({n: t.double() for n, t in part.items()} for part in (leak.weights, leak.gradients))
    slope = gradients[f"{layers[-1].name}.bias"]  # of one image, that is the loss's gradient in the logits
    outputs = Outputs(slope, slope.isfinite(), slope)
    for layer in reversed(layers):
        solve = _linear if isinstance(layer.module, nn.Linear) else _convolution
        inputs, slope = solve(layer, weights, gradients[f"{layer.name}.weight"], outputs)
        below = layers[layers.index(layer) - 1]
        if layer is not layers[0]:
            outputs = _undo(below.activation, inputs.view(below.outputs), slope.view(below.outputs))
    image: Tensor = inputs.view(shape) * network.std + network.mean
    return image.to(network.mean)


def chain(network: Network, shape: tuple[int, ...]) -> list[Layer]:
    """The network's layers with weights in order; none where it is more than a chain of such layers."""
    assert isinstance(network.body, fx.GraphModule)
    ShapeProp(network.body).propagate(torch.zeros(shape).to(network.mean))
    layers: list[Layer] = []
    for node in network.body.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        module = network.body.get_submodule(node.target) if node.op == "call_module" else None
        if len(node.all_input_nodes) != 1 or len(node.users) != 1:
            return []
        if isinstance(module, Conv2d | nn.Linear):
            before, after = (n.meta["tensor_meta"].shape[1:] for n in (node.all_input_nodes[0], node))
            layers.append(Layer(f"body.{node.target}", module, before, after, None))
        elif node.target in INVERSES and layers and layers[-1].activation is None:
            layers[-1] = layers[-1]._replace(activation=node.target)
        elif not isinstance(module, nn.Flatten | nn.Identity):
            return []
    small = all(math.prod(layer.inputs) <= LARGEST for layer in layers if isinstance(layer.module, Conv2d))
    return layers if small and layers and layers[-1].activation is None else []


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


def _convolution(layer: Layer, weights: Tensors, gradient: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """A convolution's input, by least squares over its frequencies, and the loss's gradient there."""
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

    spectrum = Spectrum(layer.inputs[1], layer.inputs[2], weight)
    grey = torch.full((1, *layer.inputs), 0.5).to(weight)
    basis = torch.eye(grey.numel()).to(weight).view(-1, *layer.inputs)
    wanted = torch.cat([forward[outputs.known], gradient.flatten()]) - equations(grey)[0]
    found = _least_squares(equations(spectrum.images(basis)).T, wanted)
    with torch.enable_grad():
        leaf = torch.zeros_like(grey).requires_grad_()
        (slope,) = torch.autograd.grad(
            F.conv2d(leaf, weight, None, stride, padding), leaf, outputs.slope[None]
        )
    return grey[0] + spectrum.images(found.view(layer.inputs)), slope[0]


def _least_squares(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The solution of least norm of ``matrix @ x = wanted``, every equation in units of its own size."""
    sizes = matrix.norm(dim=1).clamp_min(torch.finfo(matrix.dtype).tiny)
    matrix, wanted = matrix / sizes[:, None], wanted / sizes
    gram = matrix.T @ matrix
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    found = torch.zeros_like(gram[0])
    for _ in range(1 + REFINEMENTS):
        rest = matrix.T @ (wanted - matrix @ found)
        found += torch.cholesky_solve(rest[:, None], factor)[:, 0]
    return found
