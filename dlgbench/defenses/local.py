"""Several steps before anything is shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlgbench.defenses.base import Client, Defense, Tensors, finite
from dlgbench.registry import DEFENSES


@DEFENSES.register("local", positive=("steps", "rate"))
@dataclass(frozen=True)
class LocalSteps(Defense):
    """The mean gradient of ``steps`` steps of gradient descent: FedAvg's change of weights over its rate.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    algorithm 1, every step on all of the client's images.
    """

    steps: int = 5
    rate: float = 0.1

    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        return finite(self.expected(client, images, labels, {}))

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        """The same steps on other data (Dimitrov et al. 2022, "Data Leakage in Federated Averaging")."""
        weights = client.weights
        for _ in range(self.steps):
            gradients = client.gradient(images, labels, weights)
            weights = {name: weight - self.rate * gradients[name] for name, weight in weights.items()}
        moved = self.steps * self.rate
        return {name: (weight - weights[name]) / moved for name, weight in client.weights.items()}
