"""Deep leakage from gradients as a reader of the paper would write it: what dlgbench is measured against.

Zhu, Liu, Han 2019, algorithm 1: plain modules, autograd twice, and torch's own L-BFGS.  Dummies are
in the units of the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dlgbench.prepare import replace_activation


def model(network: str, weights: Sequence[Tensor]) -> nn.Module:
    """One of the study's networks with sigmoids and these weights, in train mode."""
    if network == "lenet_dlg":
        body: nn.Module = nn.Sequential(
            nn.Conv2d(3, 12, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(768, 100),
        )  # fmt: skip
    else:
        options = {"init_weights": False} if network == "inception_v3" else {}
        plain = torchvision.models.get_model(network, weights=None, **options)
        body = replace_activation(plain.train(), "sigmoid")
    for parameter, value in zip(body.parameters(), weights, strict=True):
        parameter.data = value.clone()
    return body


class Textbook:
    """One reconstruction: ``gradient`` is what leaked, in the order of the model's parameters."""

    def __init__(self, body: nn.Module, gradient: Sequence[Tensor], images: Tensor, labels: Tensor) -> None:
        self.body, self.gradient = body, gradient
        self.images, self.labels = images.clone().requires_grad_(), labels.clone().requires_grad_()
        self.optimizer = torch.optim.LBFGS([self.images, self.labels], lr=1, max_iter=20, history_size=100)
        self.closures = 0

    def closure(self) -> Tensor:
        self.closures += 1
        self.optimizer.zero_grad()
        loss = cross_entropy(self.body(self.images), self.labels.softmax(-1))
        ours = torch.autograd.grad(loss, list(self.body.parameters()), create_graph=True)
        pairs = zip(ours, self.gradient, strict=True)
        distance = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
        torch.autograd.backward(distance, inputs=[self.images, self.labels])
        return distance.detach()

    def step(self) -> float:
        """At most 20 iterations; returns the distance before them."""
        step = cast(Callable[[Callable[[], Tensor]], Tensor], self.optimizer.step)
        return float(step(self.closure))


def cross_entropy(logits: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """The loss of the client, with Inception's auxiliary head at the usual 0.4."""
    if isinstance(logits, tuple):
        return F.cross_entropy(logits[0], labels) + 0.4 * F.cross_entropy(logits[1], labels)
    return F.cross_entropy(logits, labels)
