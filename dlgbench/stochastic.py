"""Layers that draw at random.  Their draws are data: they can be drawn once, shared, or kept secret."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

DIVERGENCE = 1e-3
"""The weight of a bottleneck's divergence in the loss."""


class Stochastic(nn.Module, ABC):
    """A layer with random draws in its buffer ``mask``; until some are put there, it draws nothing."""

    mask: Tensor

    def __init__(self, idle: float) -> None:
        super().__init__()
        self.shape: torch.Size | None = None  # of the draws; noted by `prepare.probe`
        self.register_buffer("mask", torch.full((1,), idle), persistent=False)

    def draw(self, images: int, generator: torch.Generator) -> Tensor:
        """Draws for so many images, ``(image, …)``."""
        assert self.shape is not None
        return self._draw(torch.Size((images, *self.shape[1:])), generator)

    def drawn(self, features: Tensor) -> Tensor:
        """What was drawn for ``features``; raises ValueError where it was for another number of images."""
        self.shape = features.shape
        if len(self.mask) not in (1, len(features)):
            raise ValueError(f"expected {len(self.mask)} images, for which was drawn, got {len(features)}")
        return self.mask

    @abstractmethod
    def _draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor: ...


class Dropout(Stochastic):
    """Dropout: the draws are 0 with probability p, else 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__(1.0)
        self.p = p

    def forward(self, features: Tensor) -> Tensor:
        return features * self.drawn(features)

    def _draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        keep = torch.full(shape, 1 - self.p, dtype=self.mask.dtype)
        return torch.bernoulli(keep, generator=generator) / (1 - self.p)


class Sample(Stochastic):
    """Of normal distributions, whose means and log variances are the two halves of a code."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def forward(self, code: Tensor) -> Tensor:
        mean, log_variance = code.chunk(2, 1)
        return mean + (log_variance / 2).exp() * self.drawn(mean)

    def _draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=self.mask.dtype)


class Bottleneck(nn.Module):
    """A head behind a variational bottleneck of so many ``units``.

    Scheliga, Maeder, Seeland 2022, "PRECODE: A Generic Model Extension to Prevent Deep Gradient Leakage".
    It gives the logits and the code, ``(image, 2 units)``, for the `divergence`.
    """

    def __init__(self, head: nn.Linear, units: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(head.in_features, 2 * units)
        self.sample = Sample()
        self.decoder = nn.Linear(units, head.in_features)
        self.head = head

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(features)
        return self.head(self.decoder(self.sample(code))), code


def divergence(code: Tensor) -> Tensor:
    """Kullback and Leibler's, from the standard normal distribution, the mean over the images: a scalar."""
    mean, log_variance = code.chunk(2, 1)
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2
