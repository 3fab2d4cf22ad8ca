"""The gradient, and the line between what the attacker sees (`Leak`) and the truth (`Secret`).

Every tensor of the two named tuples has a leading ``case`` dimension: one row per reconstruction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from dlgbench.prepare import Network

Tensors = dict[str, Tensor]


class Leak(NamedTuple):
    """All that the attacker sees, by parameter or buffer name, each ``(case, *its own shape)``.

    ``buffers`` holds the state that the client declares beside its weights: running statistics where
    batch norm is in eval mode, dropout masks where they are known.
    """

    weights: Tensors
    buffers: Tensors
    gradients: Tensors

    def row(self, case: int) -> Leak:
        """The leak of one case, without the case dimension."""
        return Leak(*({name: tensor[case] for name, tensor in part.items()} for part in self))


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
        return network.loss(functional_call(network, (weights, buffers), (images,)), labels)

    gradient: Tensors = torch.func.grad(loss)(weights)
    return gradient


def squared_distance(ours: Tensors, theirs: Tensors) -> Tensor:
    """The squared Euclidean distance over all parameters, a scalar (Zhu et al. 2019, equation 3)."""
    return torch.stack([(ours[name] - theirs[name]).square().sum() for name in theirs]).sum()


def squared_norm(gradient: Tensors) -> Tensor:
    """The squared Euclidean norm over all parameters, a scalar."""
    return torch.stack([tensor.square().sum() for tensor in gradient.values()]).sum()
