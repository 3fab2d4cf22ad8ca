"""Defences in a training run of one's own."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from dlgbench.defenses import GradientDefense, make
from dlgbench.errors import UsageError


class DefendGradients(pl.Callback):
    """Applies a defence before every step of an optimiser: what the step sees is what a client would share.

    ``defense`` is a `GradientDefense` or its text, such as ``"prune:share=0.9"``.  Gradients are defended
    once a step, after accumulation, unscaling and, on several devices, averaging; parameters without one are
    left out, as is a step whose gradients overflowed in ``16-mixed``, which is not taken.  The draws begin at
    ``seed`` and go on where a checkpoint ended.
    """

    def __init__(self, defense: str | GradientDefense, seed: int = 0) -> None:
        made = make(defense) if isinstance(defense, str) else defense
        if not isinstance(made, GradientDefense):
            raise UsageError(
                f"DefendGradients: expected a defence of the whole gradient, got {defense}, which needs the "
                "client's data: call its `update` in your training step"
            )
        self.defense = made
        self.generator = torch.Generator().manual_seed(seed)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        named = {name: p for name, p in pl_module.named_parameters() if id(p) in theirs}
        gradients = {name: p.grad.detach() for name, p in named.items() if p.grad is not None}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and not all(bool(g.isfinite().all()) for g in gradients.values()):
            return  # the scale of 16-mixed is too large still: it leaves out this step
        for name, shared in self.defense(gradients, self.generator).items():
            named[name].grad = shared

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"])
