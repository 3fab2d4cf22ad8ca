"""No defence, and noise on every coordinate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dlgbench.defenses.base import GradientDefense, Tensors, normal, uniform
from dlgbench.registry import DEFENSES


@DEFENSES.register("none")
@dataclass(frozen=True)
class NoDefense(GradientDefense):
    """The gradient as it is."""

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return gradients


@DEFENSES.register("noise", positive=("std",))
@dataclass(frozen=True)
class GaussianNoise(GradientDefense):
    """Gaussian noise on every coordinate (Zhu et al. 2019, section 5.1)."""

    std: float = 0.01

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return {name: g + self.std * normal(g, generator) for name, g in gradients.items()}

    def doubt(self, shared: Tensors, batch: int) -> Tensors:
        return {name: gradient.new_tensor(self.std) for name, gradient in shared.items()}


@DEFENSES.register("laplace", positive=("scale",))
@dataclass(frozen=True)
class LaplaceNoise(GradientDefense):
    """Laplace noise on every coordinate (Zhu et al. 2019, section 5.1): its deviation is root 2 the scale."""

    scale: float = 0.01

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        def noise(like: torch.Tensor) -> torch.Tensor:  # of two exponentials, the difference
            return uniform(like, generator).log() - uniform(like, generator).log()

        return {name: g + self.scale * noise(g) for name, g in gradients.items()}

    def doubt(self, shared: Tensors, batch: int) -> Tensors:
        return {name: gradient.new_tensor(math.sqrt(2) * self.scale) for name, gradient in shared.items()}
