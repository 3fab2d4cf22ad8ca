"""What a residual network computes on its images, from the head down, read off the gradient of its weights.

Where batch norm is in eval mode and units are rectified, the loss's gradient at a layer's output, its
slope, follows from that above and from which units live.  The gradients of the convolutions that see a layer
are then linear equations for it, the same for each of its channels (Eltaras et al. 2024, "R-CONV"): K kernels
of three by three taps give 9 K, for as many unknowns as there are positions in all images.  The topmost
convolution needs nothing from above: `shifts`.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from dlgbench import leastsquares, shifts
from dlgbench.convolution import Conv2d, input_slope
from dlgbench.leak import Leak
from dlgbench.prepare import ACTIVATIONS

LARGEST = 2500
"""Positions of a layer that is solved for, in all images together."""
LEAST = 1e-7
"""How well the worst seen combination of unknowns has to be seen, in units of the best (squared)."""
MISFIT = 1e-4
"""A layer's relative error beyond which the slope was not what it was taken to be, or the leak no gradient.
Measured on resnet18 in float32: at most 1e-6, and 1e-3 where four living units were taken for dead."""

ROUNDING, DOUBTED = 10.0, 30.0
"""How much is taken for rounding at most, and how much may be, in units of the lowest value of a layer that
has none below 0."""
EXACT = 1e-5
"""How far from the gradient of a bias the slopes' sum may be, in units of their magnitudes' sum."""


class Layers:
    """The layers of ``body`` as far down as they can be solved for, from the leak of one case in float64.

    ``body`` has gone through shape propagation with the batch; the leak's names begin with ``body.``.
    """

    def __init__(self, body: fx.GraphModule, leak: Leak) -> None:
        self.body = body
        self.leak = leak
        self.values: dict[fx.Node, Tensor] = {}
        """The output of nodes, ``(image, channel, height, width)``, where convolutions see it."""
        self.slopes: dict[fx.Node, Tensor] = {}
        """The loss's gradient there."""
        self.shares: dict[fx.Node, list[Tensor]] = defaultdict(list)
        """What the users of a node contribute to its slope."""
        self.features: Tensor
        """A multiple of the slope of what is pooled from the topmost layer, ``(image, channel)``."""
        nodes = list(reversed(body.graph.nodes))
        self._begin(next((node for node in nodes if self._convolution(node)), None))
        for node in nodes:
            if node not in self.slopes and 0 < len(self.shares[node]) == len(node.users):
                self.slopes[node] = torch.stack(self.shares[node]).sum(0)
            if node in self.slopes:
                self._solve(node)
                self._pass_on(node, self.slopes[node])

    def _begin(self, top: fx.Node | None) -> None:
        """The slopes behind the topmost convolution's norm, of which the bias' gradient is the sum."""
        norm = next(iter(top.users)) if top and len(top.users) == 1 else None
        if top is None or norm is None or not self._norm(norm) or _size(top) != _size(top.all_input_nodes[0]):
            return
        images, _, height, width = _size(top)
        found = shifts.slopes(self._gradient(top, "weight"), images, height, width)
        if found is None:
            return
        found = found / self._scale(norm)
        factors = leastsquares.solve_determined(
            found.sum((2, 3)).T, self._gradient(norm, "bias")[:, None], LEAST
        )
        if factors is not None:
            self.slopes[norm] = found * factors[..., None, None]
            self.features = self.slopes[norm].sum((2, 3))
            self.slopes |= {user: self.slopes[norm] for user in norm.users if user.target is operator.add}

    def _solve(self, node: fx.Node) -> None:
        """What convolutions see of a node, if their slopes determine it."""
        seen_by = [user for user in node.users if self._convolution(user)]
        images, channels, *places = _size(node)
        if not seen_by or images * math.prod(places) > LARGEST:
            return
        matrix = torch.cat([self._equations(user, places) for user in seen_by])
        wanted = torch.cat([_sides(self._gradient(user, "weight")) for user in seen_by])
        found = leastsquares.solve_determined(matrix, wanted, LEAST)
        if found is not None and (matrix @ found - wanted).norm() < MISFIT * wanted.norm():
            self.values[node] = found.view(images, -1, channels).mT.reshape(_size(node))

    def _equations(self, convolution: fx.Node, places: Sequence[int]) -> Tensor:
        """Its weight's gradient, ``(kernel and tap, image and position)``, in one of the channels it sees."""
        layer, slopes = cast(Conv2d, self._layer(convolution)), self.slopes[convolution]
        taps = layer.weight[0, 0].numel()
        each = torch.eye(taps).to(slopes).view(1, taps, *layer.weight.shape[2:])
        kernels = slopes.flatten(0, 1)[:, None]
        planes = input_slope(layer, each, kernels, (len(kernels), taps, *places))
        return planes.view(len(slopes), -1, math.prod(places)).transpose(0, 1).flatten(1)

    def _pass_on(self, node: fx.Node, slope: Tensor) -> None:
        """A node's slope to what it is computed from; nothing where it is not known how."""
        sources = node.all_input_nodes
        if self._convolution(node):
            layer, weight = cast(Conv2d, self._layer(node)), self.leak.weights[f"body.{node.target}.weight"]
            slope = input_slope(layer, weight, slope, _size(sources[0]))
        elif self._norm(node):
            slope = slope * self._scale(node)
        elif node.target is ACTIVATIONS["relu"] and node in self.values:
            alive = self._alive(node)
            self.values[node] = torch.where(alive, self.values[node], 0)
            slope = slope * alive
        elif node.target is not operator.add:
            return
        for source in sources:
            self.shares[source].append(slope)

    def _alive(self, node: fx.Node) -> Tensor:
        """Which rectified units live: those above rounding, but for one a channel where their slopes say so.

        The slopes of the living sum to the gradient of the bias of the norm below.  Values alone do not
        tell the smallest living units from dead ones, and a single error spoils every layer below.
        """
        (before,) = node.all_input_nodes
        norm = next(n for n in (before, *before.all_input_nodes) if self._norm(n))
        values, slopes = self.values[node], self.slopes[node]
        lowest = (-values).amax().clamp_min(0)  # no value is negative
        alive = values > _rounding(values, lowest)
        missing = self._gradient(norm, "bias")[:, None, None] - _sums(slopes * alive)
        left = (missing - torch.where(alive, -slopes, slopes)).abs()
        left[values.abs() > DOUBTED * lowest] = torch.inf
        exact = EXACT * _sums(slopes.abs())
        return alive ^ (left == left.amin((0, 2, 3), keepdim=True)) & (left < exact) & (missing.abs() > exact)

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.body.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _convolution(self, node: fx.Node) -> bool:
        return type(self._layer(node)) is Conv2d

    def _norm(self, node: fx.Node) -> bool:
        """Whether it is batch norm with weights in eval mode: for train mode the package has its own."""
        layer = self._layer(node)
        return type(layer) is nn.BatchNorm2d and layer.affine and not layer.training

    def _scale(self, norm: fx.Node) -> Tensor:
        """By what batch norm in eval mode multiplies each channel, ``(channel, 1, 1)``."""
        layer, name = cast(nn.BatchNorm2d, self._layer(norm)), f"body.{norm.target}"
        variance = self.leak.buffers[f"{name}.running_var"] + layer.eps
        return (self.leak.weights[f"{name}.weight"] / variance.sqrt())[:, None, None]

    def _gradient(self, node: fx.Node, parameter: str) -> Tensor:
        return self.leak.gradients[f"body.{node.target}.{parameter}"]


def _size(node: fx.Node) -> torch.Size:
    size: torch.Size = node.meta["tensor_meta"].shape
    return size


def _rounding(values: Tensor, lowest: Tensor) -> Tensor:
    """The end of what is rounding: below the widest gap, as a ratio, among the values near ``lowest``."""
    ends = torch.cat([lowest[None], values[values > lowest].sort().values, lowest[None] + torch.inf])
    steps = ends[:-1] / ends[1:]
    steps[ends[:-1] > ROUNDING * lowest] = 1
    return ends[steps.argmin()]


def _sums(slopes: Tensor) -> Tensor:
    """Over images and positions, ``(1, channel, 1, 1)``."""
    return slopes.sum((0, 2, 3), keepdim=True)


def _sides(gradient: Tensor) -> Tensor:
    """``(kernel, channel, …)`` → ``(kernel and tap, channel)``"""
    return gradient.flatten(2).transpose(1, 2).flatten(0, 1)
