"""Defences: what a client does to its gradients before it shares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlgbench.registry import DEFENSES


class Defense(Protocol):
    """A pure function of gradients by parameter name; all randomness comes from ``generator``."""

    def __call__(self, gradients: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]: ...


@DEFENSES.register("none")
@dataclass(frozen=True)
class NoDefense:
    """The gradient as it is."""

    def __call__(self, gradients: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return gradients


@DEFENSES.register("noise", positive=("std",))
@dataclass(frozen=True)
class GaussianNoise:
    """Gaussian noise on every coordinate (Zhu et al. 2019, section 5.1)."""

    std: float = 0.01

    def __call__(self, gradients: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return {
            name: g + self.std * torch.randn(g.shape, generator=generator, dtype=g.dtype, device=g.device)
            for name, g in gradients.items()
        }
