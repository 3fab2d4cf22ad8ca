"""The head's gradient without the features that tell most of the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlgbench.defenses.base import Client, Defense, Tensors, finite, normal
from dlgbench.errors import UsageError
from dlgbench.registry import DEFENSES

PROBES = 16
"""Random directions by which |dr/dx| is estimated, to 18 %: one derivative a feature would take a second."""


@DEFENSES.register("soteria")
@dataclass(frozen=True)
class Soteria(Defense):
    """Leaves out, of the head's weight gradient, the columns of the most telling features.

    Those with the largest ``|r| / |dr/dx|``, of several images the sum (Sun et al. 2021, "Soteria:
    Provable Defense against Privacy Leakage in Federated Learning from Representation Perspective",
    section 4.2, with the 0-norm).  Where |dr/dx| is 0 the feature tells nothing and stays.
    """

    share: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(
                f"soteria: expected the share of features left out in [0, 1), got share={self.share}"
            )

    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        gradients = finite(client.gradient(images, labels))
        telling = _telling(client, images, generator)
        left_out = telling.topk(round(self.share * len(telling))).indices
        weight = gradients[f"{client.head}.weight"].index_fill(1, left_out, 0)
        return {**gradients, f"{client.head}.weight": weight}

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        """Without the columns that were left out, which are seen (Balunovic et al. 2022, section 5)."""
        name = f"{client.head}.weight"
        gradients = client.gradient(images, labels)
        return {**gradients, name: torch.where((shared[name] == 0).all(0), 0, gradients[name])}


def _telling(client: Client, images: Tensor, generator: torch.Generator) -> Tensor:
    """``|r| / |dr/dx|`` of every feature, ``(feature,)``, summed over the images."""
    probes = normal(images.expand(PROBES, *images.shape), generator)
    with torch.enable_grad():  # derivatives along the probes: twice backward is once forward
        leaf = images.detach().requires_grad_()
        features = client.features(leaf)
        cotangent = torch.zeros_like(features, requires_grad=True)
        (pulled,) = torch.autograd.grad(features, leaf, cotangent, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, cotangent, probes, is_grads_batched=True)
    steepness = pushed.square().mean(0).sqrt()
    return torch.where(steepness > 0, features.detach().abs() / steepness, 0).sum(0)
