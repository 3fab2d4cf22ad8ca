"""The strongest attack against a client that defends itself: it knows the defence, but not its draws."""

from __future__ import annotations

import torch
from torch import Tensor

from dlgbench.attacks.base import Task
from dlgbench.attacks.frequencies import Frequencies
from dlgbench.defenses.base import norm
from dlgbench.leak import Client, Leak
from dlgbench.prepare import Network
from dlgbench.registry import ATTACKS
from dlgbench.spectrum import CONTRAST

ROUNDING = 1e-7
"""Of the whole gradient's norm: what float32 leaves uncertain of every entry, whatever the defence."""


@ATTACKS.register(
    "adaptive",
    labels="recovered first, by counts",
    priors="photos' spectrum, range of pixels, the defence and its parameters",
    adaptive=True,
    revision={
        "default": 1,
        "network.batchnorm=train": 3,
        "network.batchnorm=shared": 2,
        "network.batchnorm=eval": 2,
    },
    positive=("learning_rate", "history", "iterations"),
)
class Adaptive(Frequencies):
    """The most probable image given what the defence shares.

    No start is solved for: that would amplify noise and rounding from layer to layer.
    What a client with the dummies' gradient would share is compared with what was shared: where the
    defence leaves something to chance, in units of its standard deviation; a natural image's
    coefficients are taken to be Gaussian, each with its expected amplitude.  The objective is the
    negative logarithm of the posterior (Balunovic et al. 2022, "Bayesian framework for gradient
    leakage", section 4), an approximation where the doubt is not Gaussian.
    """

    def __init__(
        self,
        network: Network,
        task: Task,
        *,
        learning_rate: float = 1.0,
        history: int = 100,
        iterations: int = 20,
    ) -> None:
        super().__init__(network, task, learning_rate=learning_rate, history=history, iterations=iterations)
        assert task.defense is not None
        self.defense = task.defense

    def distance(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensor:
        """``(sum |expected(g) - shared|^2 / doubt^2 + |coefficients|^2) / pixels``, over the weights."""
        shared = {name: gradient for name, gradient in leak.gradients.items() if gradient.dim() > 1}
        ours = Client(self.soft, leak.weights, leak.buffers)
        expected = self.defense.expected(ours, images, labels.softmax(-1), leak.gradients)
        doubt = self.defense.doubt(leak.gradients, len(images))
        rounding = ROUNDING * norm(shared)
        variance = torch.where(rounding > 0, rounding, 1).square()  # of nothing there is no rounding
        terms = [
            ((expected[name] - gradient).square() / (doubt[name].square() + variance)).sum()
            for name, gradient in shared.items()
        ]
        prior = self.spectrum.coefficients((images - self.middle) / CONTRAST).square().sum()
        return (torch.stack(terms).sum() + prior) / images.numel()
