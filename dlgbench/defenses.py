"""Defences: what a client does to its gradients before it shares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlgbench.registry import DEFENSES


class Defense(Protocol):
    """A pure function of gradients by parameter name; all randomness comes from ``generator``, a CPU one."""

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
        def noise(like: Tensor) -> Tensor:  # drawn on the CPU: every device then meets the same noise
            return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

        return {name: gradient + self.std * noise(gradient) for name, gradient in gradients.items()}
