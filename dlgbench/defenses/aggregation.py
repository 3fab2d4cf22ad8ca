"""Secure aggregation: the server learns the sum over several clients, and of each alone nothing.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", section 4,
simulated at the level of what the server sees: whole numbers modulo `MODULUS`, masked pair by pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dlgbench.defenses.base import UNIFORM, Client, Defense, Tensors, client_sums, taken_apart, unflat
from dlgbench.errors import UsageError
from dlgbench.prepare import Network
from dlgbench.registry import DEFENSES

MODULUS = 2**32
UNIT = 2.0**-20
"""The least difference of two numbers; their sum may lie between -2048 and 2048."""
Masks = Mapping[tuple[int, int], Tensor]
"""For every pair of clients, the lesser first: what one adds and the other takes away."""


@DEFENSES.register("secagg", positive=("clients",))
@dataclass(frozen=True)
class SecureAggregation(Defense):
    """The batch is spread over ``clients``, and the server learns the sum of those that do not drop out.

    Numbers are rounded to multiples of `UNIT`; nothing else is lost.
    """

    clients: int = 8
    dropped: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dropped < self.clients:
            raise UsageError(
                f"secagg: expected fewer clients that drop out than the {self.clients} that there are, got "
                f"{self.dropped}"
            )

    def protect(self, network: Network, shape: tuple[int, ...]) -> Network:
        return taken_apart(network, shape)

    @property
    def least(self) -> int:
        return self.clients

    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        sums = client_sums(client, images, labels, self.clients)
        masks = pairwise(self.clients, sums[0], generator)
        present = self.clients - self.dropped  # who drops out does so when all masks are agreed upon
        sent = [masked(encode(sums[one], self.clients), one, masks) for one in range(present)]
        total = unmasked(torch.stack(sent).sum(0), present, masks)
        count = len(self._present(images))
        return unflat(decode(total).to(sums[0]) / count, client.weights)

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        """The mean over all that is summed: matching it is the attack on a batch."""
        return client.gradient(self._present(images), self._present(labels))

    def doubt(self, shared: Tensors, batch: int) -> Tensors:
        summed = len(self._present(torch.empty(batch)))
        rounding = UNIFORM * UNIT * (self.clients - self.dropped) ** 0.5 / max(summed, 1)
        return {name: gradient.new_tensor(rounding) for name, gradient in shared.items()}

    def _present(self, batch: Tensor) -> Tensor:
        return torch.cat(batch.tensor_split(self.clients)[: self.clients - self.dropped])


def encode(values: Tensor, clients: int) -> Tensor:
    """Whole numbers modulo `MODULUS`; clamped, so that the sum over ``clients`` stays in its range."""
    most = MODULUS // 2 // clients - 1
    return (values.double() / UNIT).round().clamp(-most, most).long() % MODULUS


def decode(total: Tensor) -> Tensor:
    """The inverse of `encode` of a sum, in float64."""
    return ((total + MODULUS // 2) % MODULUS - MODULUS // 2).double() * UNIT


def pairwise(clients: int, like: Tensor, generator: torch.Generator) -> Masks:
    """Uniform masks for every pair, on the device of ``like``."""
    return {
        pair: torch.randint(MODULUS, like.shape, generator=generator).to(like.device)
        for pair in itertools.combinations(range(clients), 2)
    }


def masked(numbers: Tensor, client: int, masks: Masks) -> Tensor:
    """What a client sends: uniformly distributed to whoever lacks one of its masks."""
    for (less, more), mask in masks.items():
        numbers = numbers + (client == less) * mask - (client == more) * mask
    return numbers % MODULUS


def unmasked(total: Tensor, present: int, masks: Masks) -> Tensor:
    """The sum of what the first ``present`` clients sent, less their masks with those that dropped out."""
    for (less, more), mask in masks.items():
        if less < present <= more:
            total = total - mask
    return total % MODULUS
