"""Small entries are not shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlgbench.defenses.base import GradientDefense, Tensors, flat, unflat
from dlgbench.errors import UsageError
from dlgbench.registry import DEFENSES


@dataclass(frozen=True)
class _Pruning(GradientDefense):
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(
                f"pruning: expected the share that is left out in [0, 1), got share={self.share}"
            )

    def size(self, shared: Tensors) -> int:
        """Of what is shared, and where: as a bit an entry, or a number of four bytes where that is less."""
        return sum(_sparse(gradient) for gradient in shared.values())

    def pruned(self, values: Tensor) -> Tensor:
        """``values`` without the smallest share of them."""
        count = round(self.share * values.numel())
        if count == 0:
            return values.clone()
        largest = values.abs().flatten().kthvalue(count).values
        return torch.where(values.abs() > largest, values, 0)


@DEFENSES.register("prune")
@dataclass(frozen=True)
class Prune(_Pruning):
    """The smallest share of every tensor's entries becomes 0 (Zhu et al. 2019, section 5.2).

    As in gradient compression (Lin et al. 2018, "Deep Gradient Compression", section 3), without its
    memory of what was left out.
    """

    share: float = 0.9

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return {name: self.pruned(gradient) for name, gradient in gradients.items()}

    def foreseen(self, ours: Tensors, shared: Tensors) -> Tensors:
        return {name: _beyond(ours[name], g, _smallest(g)) for name, g in shared.items()}


@DEFENSES.register("topk")
@dataclass(frozen=True)
class TopK(_Pruning):
    """The smallest share of all entries becomes 0, wherever they are: small layers may vanish."""

    share: float = 0.9

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return unflat(self.pruned(flat(gradients)), gradients)

    def foreseen(self, ours: Tensors, shared: Tensors) -> Tensors:
        smallest = torch.stack([_smallest(gradient) for gradient in shared.values()]).amin()
        return {name: _beyond(ours[name], gradient, smallest) for name, gradient in shared.items()}


def _sparse(shared: Tensor) -> int:
    count = int(shared.count_nonzero())
    return count * shared.itemsize + min(-(-shared.numel() // 8), 4 * count)


def _smallest(shared: Tensor) -> Tensor:
    """The least magnitude that was shared: what is 0 was below it; infinity where all is 0."""
    return torch.where(shared == 0, torch.inf, shared.abs()).amin()


def _beyond(ours: Tensor, shared: Tensor, most: Tensor) -> Tensor:
    """``ours`` where it was shared, elsewhere by how much it is too large to have been left out."""
    return ours - torch.where(shared == 0, ours.clamp(-most, most), 0)
