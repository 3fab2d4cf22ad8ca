"""Ordinary training, of networks whose gradient is to leak later."""

from __future__ import annotations

import torch
from torch import Tensor

from dlgbench.prepare import Network

BATCH = 32
"""Images a step."""
RATE = 2e-3
"""Adam's learning rate: both LeNets learn with it, sigmoid and ReLU, from their own initialisations."""


def train(
    network: Network, images: Tensor, labels: Tensor, epochs: int, generator: torch.Generator
) -> Network:
    """Train ``network`` in place, by Adam in a new order every epoch, and return it.

    ``images`` are ``(image, channel, height, width)`` in [0, 1], ``labels`` class indices ``(image,)``;
    the order comes from ``generator``, a CPU one.
    """
    weights = list(network.requires_grad_().parameters())
    optimizer = torch.optim.Adam(weights, RATE)
    for _ in range(epochs):
        for some in torch.split(torch.randperm(len(images), generator=generator), BATCH):
            loss = network.loss(network(images[some]), labels[some])
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()
    return network.requires_grad_(False)


@torch.no_grad()
def accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    """The share of ``images`` to which the network's (first) head gives their label."""
    return float((network(images)[0].argmax(1) == labels).double().mean())
