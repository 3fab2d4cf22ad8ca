"""Training on mixtures of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlgbench.defenses.base import Client, Defense, Tensors, finite
from dlgbench.registry import DEFENSES


@DEFENSES.register("mixup")
@dataclass(frozen=True)
class MixUp(Defense):
    """The gradient of a batch mixed with itself in another order, images and labels alike.

    Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", section 2, with alpha = 1: the share
    of the first is uniform in (0, 1).
    """

    @property
    def least(self) -> int:
        return 2

    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        share = float(torch.rand((), generator=generator))
        other = torch.randperm(len(images), generator=generator).to(images.device)
        mixed, labels = (share * batch + (1 - share) * batch[other] for batch in (images, labels))
        return finite(client.gradient(mixed, labels))

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        """Of the mixtures themselves, which are all that the gradient depends on."""
        return client.gradient(images, labels)
