"""Bounded length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dlgbench.defenses.base import Defense, Tensors, norm
from dlgbench.registry import DEFENSES


@DEFENSES.register("clip", positive=("bound",))
@dataclass(frozen=True)
class Clip(Defense):
    """A gradient that is longer than ``bound`` is shortened to it, all tensors by the same factor."""

    bound: float = 1.0

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        factor = self.bound / norm(gradients).clamp_min(self.bound)
        return {name: factor * gradient for name, gradient in gradients.items()}

    def expected(self, ours: Tensors, shared: Tensors) -> Tensors:
        factor = self.bound / norm(ours).clamp_min(self.bound)
        return {name: factor * gradient for name, gradient in ours.items()}
