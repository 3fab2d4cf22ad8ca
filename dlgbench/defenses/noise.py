"""No defence, and noise on every coordinate."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dlgbench.defenses.base import Client, GradientDefense, Tensors, normal, uniform
from dlgbench.registry import DEFENSES


@DEFENSES.register("none")
@dataclass(frozen=True)
class NoDefense(GradientDefense):
    """The gradient as it is."""

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return gradients


class _Noise(GradientDefense):
    """Independent noise of mean 0 on every coordinate, anew in each of the ``rounds`` that an attacker sees
    of the same batch at the same weights: of all that it knows, their mean says as much as they do."""

    rounds: int

    @property
    @abstractmethod
    def deviation(self) -> float:
        """The standard deviation of one round's noise."""

    def observed(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        private = client.gradient(images, labels)
        total = self(private, generator)
        for _ in range(self.rounds - 1):
            total = {name: total[name] + shared for name, shared in self(private, generator).items()}
        return {name: shared / self.rounds for name, shared in total.items()}

    def doubt(self, shared: Tensors, batch: int) -> Tensors:
        left = self.deviation / math.sqrt(self.rounds)
        return {name: gradient.new_tensor(left) for name, gradient in shared.items()}


@DEFENSES.register("noise", later={"rounds": 1}, positive=("std", "rounds"))
@dataclass(frozen=True)
class GaussianNoise(_Noise):
    """Gaussian noise on every coordinate (Zhu et al. 2019, section 5.1)."""

    std: float = 0.01
    rounds: int = 1

    @property
    def deviation(self) -> float:
        return self.std

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return {name: g + self.std * normal(g, generator) for name, g in gradients.items()}


@DEFENSES.register("laplace", later={"rounds": 1}, positive=("scale", "rounds"))
@dataclass(frozen=True)
class LaplaceNoise(_Noise):
    """Laplace noise on every coordinate (Zhu et al. 2019, section 5.1): its deviation is root 2 the scale."""

    scale: float = 0.01
    rounds: int = 1

    @property
    def deviation(self) -> float:
        return math.sqrt(2) * self.scale

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        def noise(like: Tensor) -> Tensor:  # of two exponentials, the difference
            return uniform(like, generator).log() - uniform(like, generator).log()

        return {name: g + self.scale * noise(g) for name, g in gradients.items()}
