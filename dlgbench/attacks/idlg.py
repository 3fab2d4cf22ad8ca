"""Improved Deep Leakage from Gradients: Zhao, Mopuri, Bilen 2020 (arXiv 2001.02610)."""

from __future__ import annotations

from functools import partial

import torch

from dlgbench.attacks.base import LabelsFirst, Task
from dlgbench.optim import LBFGS
from dlgbench.prepare import Network
from dlgbench.registry import ATTACKS


@ATTACKS.register(
    "idlg",
    labels="recovered first, by counts",
    priors="none",
    positive=("learning_rate", "history", "iterations"),
)
class IDLG(LabelsFirst):
    """The label first, then images alone, squared distance, L-BFGS (Zhao et al. 2020, algorithm 1).

    All else is as in `dlg`.  The paper has one image per gradient; the labels of several are counted.
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([self.dummy_images])
