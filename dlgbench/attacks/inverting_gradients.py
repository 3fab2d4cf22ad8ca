"""Inverting Gradients: Geiping, Bauermeister, Dröge, Moeller, NeurIPS 2020 (arXiv 2003.14053)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlgbench.adam import BoxedAdam
from dlgbench.attacks.base import LabelsFirst, Task, total_variation
from dlgbench.leak import Leak
from dlgbench.prepare import Network
from dlgbench.registry import ATTACKS

MILESTONES = (3 / 8, 5 / 8, 7 / 8)
"""Of the whole run: where the learning rate falls to a tenth (appendix, and the authors' code)."""


@ATTACKS.register(
    "inverting_gradients",
    labels="recovered first, by counts",
    priors="total variation, pixels in [0, 1]",
    positive=("learning_rate", "iterations"),
)
class InvertingGradients(LabelsFirst):
    """Cosine distance and total variation by Adam on the gradient's sign (Geiping et al. 2020, equation 4).

    The learning rate, its schedule, the sign and the box are those of the paper's experiments and
    code, where total variation weighs 1e-4 to 1e-1.  A step is 20 iterations here, so that it costs
    what a step of L-BFGS does: the paper's 4800 iterations are 240 steps, its 24000 are 1200.
    """

    def __init__(
        self,
        network: Network,
        task: Task,
        *,
        learning_rate: float = 0.1,
        total_variation: float = 1e-2,
        iterations: int = 20,
    ) -> None:
        super().__init__(network, task)
        self.learning_rate = learning_rate
        self.total_variation = total_variation
        self.iterations = iterations

    def distance(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensor:
        """``1 - <g, g*> / (|g| |g*|) + weight * TV``."""
        ours = self.gradients(images, labels.softmax(-1), leak)
        product, our_norm, their_norm = (
            torch.stack([(a[name] * b[name]).sum() for name in ours]).sum()
            for a, b in ((ours, leak.gradients), (ours, ours), (leak.gradients, leak.gradients))
        )
        variation = total_variation(self.network.normalise(images))
        return 1 - product / (our_norm * their_norm).sqrt() + self.total_variation * variation

    def configure_optimizers(self) -> Any:
        optimizer = SignedAdam(
            self.dummy_images, self.network.box, self.learning_rate, self.iterations, self.active
        )
        steps = self.trainer.estimated_stepping_batches
        falls = [round(steps * share) for share in MILESTONES]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SignedAdam(BoxedAdam):
    """Adam on the sign of the gradient."""

    def descend(self) -> None:
        assert self.dummies.grad is not None
        self.dummies.grad = self.dummies.grad.sign()
        super().descend()
