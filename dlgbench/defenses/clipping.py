"""Bounded length, of a whole gradient or of every example's, with noise behind it."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from dlgbench.defenses.base import (
    Client,
    Defense,
    GradientDefense,
    Tensors,
    clipped,
    finite,
    normal,
    taken_apart,
)
from dlgbench.prepare import Network
from dlgbench.registry import DEFENSES

PROMISE = 100.0
"""An ε that promises nothing."""


@DEFENSES.register("clip", positive=("bound",))
@dataclass(frozen=True)
class Clip(GradientDefense):
    """A gradient that is longer than ``bound`` is shortened to it, all tensors by the same factor."""

    bound: float = 1.0

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return clipped(gradients, self.bound)

    def foreseen(self, ours: Tensors, shared: Tensors) -> Tensors:
        return clipped(ours, self.bound)


@DEFENSES.register("dpsgd", positive=("multiplier", "bound"))
@dataclass(frozen=True)
class DPSGD(Defense):
    """Every example's gradient clipped to ``bound``, Gaussian noise of ``multiplier`` bounds on their sum.

    Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1.
    """

    multiplier: float = 1.0
    bound: float = 1.0

    def protect(self, network: Network, shape: tuple[int, ...]) -> Network:
        return taken_apart(network, shape)

    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        mean = finite(self.expected(client, images, labels, {}))
        deviation = self.multiplier * self.bound / len(images)
        return {name: g + deviation * normal(g, generator) for name, g in mean.items()}

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        """The mean of the examples' clipped gradients."""

        def one(image: Tensor, label: Tensor) -> Tensors:
            return clipped(client.gradient(image[None], label[None]), self.bound)

        examples: Tensors = torch.func.vmap(one)(images, labels)
        return {name: gradients.mean(0) for name, gradients in examples.items()}

    def doubt(self, shared: Tensors, batch: int) -> Tensors:
        return {name: g.new_tensor(self.multiplier * self.bound / batch) for name, g in shared.items()}

    def refusal(self, trains: bool) -> str | None:
        missing = importlib.util.find_spec("opacus") is None
        return 'its ε is computed by Opacus: pip install "dlgbench[dp]"' if trains and missing else None

    def epsilon(self, rate: float, steps: int, delta: float) -> float:
        """By the numerical composition of privacy losses (Gopi et al. 2021) in Opacus.

        Where it is beyond `PROMISE` the looser bound by Rényi divergences, of which the numerical one
        would take hours.
        """
        from opacus.accountants import PRVAccountant, RDPAccountant

        loose, tight = RDPAccountant(), PRVAccountant()
        loose.history = tight.history = [(self.multiplier, rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bounds so loose that nobody cares for their tightness
            bound = float(loose.get_epsilon(delta))
        return bound if bound > PROMISE else float(tight.get_epsilon(delta))
