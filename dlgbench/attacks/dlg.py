"""Deep Leakage from Gradients: Zhu, Liu, Han, NeurIPS 2019 (arXiv 1906.08935)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dlgbench.attacks.base import Attack, Task
from dlgbench.optim import LBFGS
from dlgbench.prepare import Network
from dlgbench.registry import ATTACKS


@ATTACKS.register(
    "dlg",
    labels="optimised with the images",
    priors="none",
    positive=("learning_rate", "history", "iterations"),
)
class DLG(Attack):
    """Images and soft labels together, squared distance, L-BFGS (Zhu et al. 2019, algorithm 1).

    The defaults are those of the paper's section 4.1 and its code; the two tolerances are the
    defaults of ``torch.optim.LBFGS``, which the code leaves as they are.
    """

    def __init__(
        self,
        network: Network,
        task: Task,
        *,
        learning_rate: float = 1.0,
        history: int = 100,
        iterations: int = 20,
        tolerance_gradient: float = 1e-7,
        tolerance_change: float = 1e-9,
    ) -> None:
        super().__init__(network, task)
        self.optimizer = partial(
            LBFGS, active=self.active,
            lr=learning_rate, history_size=history, max_iter=iterations,
            tolerance_grad=tolerance_gradient, tolerance_change=tolerance_change,
        )  # fmt: skip

    def start(self, task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Standard normal noise for both, the images' in the network's normalised input."""
        images = torch.randn(task.image, task.channel, task.height, task.width, generator=generator)
        return images, torch.randn(task.image, task.classes, generator=generator)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([self.dummy_images, self.dummy_labels])
