"""The gradient, and the line between what the attacker sees (`Leak`) and the truth (`Secret`).

Every tensor of the two named tuples has a leading ``case`` dimension: one row per reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from dlgbench.batchnorm import DIMENSIONS, SharedBatchNorm2d
from dlgbench.prepare import Network

Tensors = dict[str, Tensor]


class Leak(NamedTuple):
    """All that the attacker sees, by parameter or buffer name, each ``(case, *its own shape)``.

    ``buffers`` holds the state that the client declares beside its weights: running statistics where
    batch norm is in eval mode, the batch's where they are shared, dropout masks where they are known.
    """

    weights: Tensors
    buffers: Tensors
    gradients: Tensors

    def row(self, case: int) -> Leak:
        """The leak of one case, without the case dimension."""
        return Leak(*({name: tensor[case] for name, tensor in part.items()} for part in self))

    def rows(self, cases: slice | Tensor) -> Leak:
        """The leaks of some cases: views for a slice, copies for a tensor of indices."""
        return Leak(*({name: tensor[cases] for name, tensor in part.items()} for part in self))

    def replaced(self, rows: Mapping[int, Leak]) -> Leak:
        """A leak that holds what these ``rows``, each of one case, hold, and else what this one does."""
        parts = ({row: new[i] for row, new in rows.items()} for i in range(len(self)))
        return Leak(*(_replaced(ours, theirs) for ours, theirs in zip(self, parts, strict=True)))

    @property
    def contiguous(self) -> Leak:
        """The same values in the usual order of memory: copies only of what is in another."""
        return Leak(*({name: tensor.contiguous() for name, tensor in part.items()} for part in self))

    @property
    def channels_last(self) -> Leak:
        """The same values, the convolutions' weights and gradients with their channels innermost."""
        return Leak(*({name: _channels_last(tensor) for name, tensor in part.items()} for part in self))


class Secret(NamedTuple):
    """The truth, which only the judge holds."""

    images: Tensor
    """Pixels in [0, 1], ``(case, image, channel, height, width)``."""
    labels: Tensor
    """Class indices, ``(case, image)``."""


def gradients(
    network: Network, weights: Tensors, buffers: Tensors, images: Tensor, labels: Tensor
) -> Tensors:
    """The gradient of the loss in all weights, differentiable in ``images`` and ``labels``.

    ``images`` is ``(image, channel, height, width)`` in [0, 1] and ``labels`` are probabilities
    ``(image, class)``.  Client and attacker both call this function, so they agree on the loss.
    """

    def loss(weights: Tensors) -> Tensor:
        return network.loss(forward(network, weights, buffers, images), labels)

    gradient: Tensors = torch.func.grad(loss)(weights)
    return gradient


@dataclass(frozen=True)
class Client:
    """One who has this network, with these weights and buffers, and can tell the gradient of its loss."""

    network: Network
    weights: Tensors
    buffers: Tensors

    @property
    def head(self) -> str:
        """The name of the linear layer that gives the logits."""
        return self.network.head

    def gradient(self, images: Tensor, labels: Tensor, weights: Tensors | None = None) -> Tensors:
        """`gradients`, at other ``weights`` if given."""
        return gradients(self.network, weights or self.weights, self.buffers, images, labels)

    def features(self, images: Tensor) -> Tensor:
        """What enters the head, ``(image, feature)``, differentiable in ``images``."""
        return inputs(self.network, self.weights, self.buffers, images, [self.head])[self.head]

    def outputs(self, images: Tensor, weights: Tensors) -> tuple[Tensor, ...]:
        """All that `forward` gives with these weights, differentiable in both."""
        return forward(self.network, weights, self.buffers, images)


def forward(network: Network, weights: Tensors, buffers: Tensors, images: Tensor) -> tuple[Tensor, ...]:
    """What the network gives with these weights: the logits of every head, ``(image, class)``, and a code."""
    outputs: tuple[Tensor, ...] = functional_call(network, (weights, buffers), (images,))
    return outputs


def statistics(network: Network, weights: Tensors, buffers: Tensors, images: Tensor) -> Tensors:
    """Mean and (biased) variance of what enters each layer of shared statistics, by its buffers' names.

    Differentiable in ``images``; empty where the network has no such layer.
    """
    found: Tensors = {}
    layers = [name for name, layer in network.named_modules() if isinstance(layer, SharedBatchNorm2d)]
    for name, features in inputs(network, weights, buffers, images, layers).items():
        variance, mean = torch.var_mean(features, dim=DIMENSIONS, correction=0)
        found |= {f"{name}.batch_mean": mean, f"{name}.batch_var": variance}
    return found


def inputs(
    network: Network, weights: Tensors, buffers: Tensors, images: Tensor, layers: Sequence[str]
) -> Tensors:
    """What enters these layers, by their names: nothing is evaluated where there are none."""
    found: Tensors = {}
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: found.update({name: arguments[0]})
        )
        for name in layers
    ]
    try:
        if hooks:
            forward(network, weights, buffers, images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def stack(leaks: Sequence[Leak]) -> Leak:
    """Leaks of several cases each as one; without a copy where there is but one."""
    if len(leaks) == 1:
        return leaks[0]
    parts = zip(*leaks, strict=True)
    return Leak(*({name: torch.cat([part[name] for part in some]) for name in some[0]} for some in parts))


def _replaced(tensors: Tensors, rows: Mapping[int, Tensors]) -> Tensors:
    copies = {name: tensors[name].clone() for part in rows.values() for name in part}
    for row, part in rows.items():
        for name, tensor in part.items():
            copies[name][row] = tensor
    return tensors | copies


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 5:  # of the weights, only convolutions' have four dimensions beside the case
        return tensor.contiguous()
    return tensor.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def relative_square(ours: Tensor, theirs: Tensor) -> Tensor:
    """``|ours - theirs|^2 / |theirs|^2``; 0 where theirs is all 0, as of a layer that shared nothing."""
    size = theirs.square().sum()
    some = size > 0
    return torch.where(some, (ours - theirs).square().sum() / torch.where(some, size, 1), 0)


def squared_distance(ours: Tensors, theirs: Tensors) -> Tensor:
    """The squared Euclidean distance over all parameters, a scalar (Zhu et al. 2019, equation 3)."""
    return torch.stack([(ours[name] - theirs[name]).square().sum() for name in theirs]).sum()


def squared_norm(gradient: Tensors) -> Tensor:
    """The squared Euclidean norm over all parameters, a scalar."""
    return torch.stack([tensor.square().sum() for tensor in gradient.values()]).sum()
