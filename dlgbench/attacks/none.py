"""Nobody attacks: what a defence costs those who train with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgbench.leak import Client, Tensors
from dlgbench.prepare import Network
from dlgbench.registry import ATTACKS


class Shares(Protocol):
    """What clients do before they share: see `dlgbench.defenses`."""

    def update(
        self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensors: ...


@ATTACKS.register("none", trains=True, positive=("rate",))
def none(
    network: Network,
    images: Tensor,
    labels: Tensor,
    defense: Shares,
    batch: int,
    generator: torch.Generator,
    *,
    rate: float = 2e-3,
) -> Iterator[Tensors]:
    """Nobody attacks: the network is trained on defended gradients, and its accuracy is what counts.

    Trains ``network`` in place by Adam, endlessly, and yields what every update shared.  ``images`` are
    ``(image, channel, height, width)`` in [0, 1], ``labels`` class indices ``(image,)``.  Every image is in
    a batch with the same probability, ``batch`` of them on average, and an update is a sum over that
    number: Poisson sampling, which the accounting of differential privacy presumes; only a batch without
    images, of 32 one in 1e14, is drawn again.
    """
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    buffers = dict(network.named_buffers())
    optimizer = torch.optim.Adam(weights.values(), rate)
    targets = F.one_hot(labels, len(weights[f"{network.head}.weight"])).to(images)
    while True:
        some = (torch.rand(len(images), generator=generator) < batch / len(images)).nonzero().squeeze(1)
        if not len(some):
            continue
        drawn = {name: mask.to(images) for name, mask in network.draw_masks(len(some), generator).items()}
        client = Client(network, weights, {**buffers, **drawn})
        shared = defense.update(client, images[some], targets[some], generator)
        for name, weight in weights.items():
            weight.grad = shared[name] * (len(some) / batch)
        optimizer.step()
        yield shared
