"""Features dropped at random before the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlgbench.defenses.base import Client, Defense, Tensors, finite, taken_apart
from dlgbench.errors import UsageError
from dlgbench.prepare import Network
from dlgbench.registry import DEFENSES


@DEFENSES.register("dropout")
@dataclass(frozen=True)
class Dropout(Defense):
    """Of the features that enter the head a share is dropped, of every image others (Srivastava et al. 2014).

    As a defence: Scheliga, Maeder, Seeland 2023, "Dropout is NOT All You Need to Prevent Gradient Leakage".
    Every image goes through the network alone, as in DP-SGD.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"dropout: expected the share that is dropped in [0, 1), got share={self.share}")

    def protect(self, network: Network, shape: tuple[int, ...]) -> Network:
        return taken_apart(network, shape)

    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        features = client.weights[f"{client.head}.weight"].shape[1]
        kept = torch.rand(len(images), features, generator=generator, dtype=images.dtype) >= self.share
        return finite(self._mean(client, images, labels, kept.to(images)))

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        """Without the features whose columns of the head's gradient are 0: of one image, those dropped."""
        kept = (shared[f"{client.head}.weight"] != 0).any(0).to(images)
        return self._mean(client, images, labels, kept.expand(len(images), -1))

    def _mean(self, client: Client, images: Tensor, labels: Tensor, kept: Tensor) -> Tensors:
        """The mean gradient of images whose features are ``kept``, ``(image, feature)``, where it is 1."""
        name = f"{client.head}.weight"

        def one(image: Tensor, label: Tensor, mask: Tensor) -> Tensors:  # W (m f) is (W m) f
            weights = {**client.weights, name: client.weights[name] * mask}
            gradients = client.gradient(image[None], label[None], weights)
            return {**gradients, name: gradients[name] * mask}

        examples: Tensors = torch.func.vmap(one)(images, labels, kept / (1 - self.share))
        return {name: gradients.mean(0) for name, gradients in examples.items()}
