"""What watches an attack from outside: the judge, the guard, TensorBoard and the progress display."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from dlgbench.attacks.base import Attack
from dlgbench.leak import Secret
from dlgbench.metrics import assign, fidelity
from dlgbench.records import Status, finite

FRAMES = 8
BLOW_UP = 1e3
"""A dummy beyond this many units of normalised input counts as diverged.  Measured on
lenet_dlg in the reference run: 9 of 30 trials pass it within 10 steps; let go on for 300, none found a better
iterate.  Those that recovered stayed below 5."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Judge(pl.Callback):
    """Holds one case's secret and measures every iterate of that row against it."""

    def __init__(self, secret: Secret, steps: int, row: int = 0) -> None:
        self.images, self.labels = secret.images[row], secret.labels[row]
        self.row = row
        self.history: dict[str, list[float | None]] = {"mse": [], "psnr": [], "ssim": []}
        self.frames: dict[int, Pixels] = {}
        self.frame_steps = frame_steps(steps)
        self.last = to_uint8(self.images)

    def on_train_start(self, trainer: pl.Trainer, attack: pl.LightningModule) -> None:
        self.measure(attack, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, attack: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.measure(attack, batch_idx + 1)

    def on_train_end(self, trainer: pl.Trainer, attack: pl.LightningModule) -> None:
        self.frames[len(self.history["mse"]) - 1] = self.last  # also where the trial stopped early

    def measure(self, attack: pl.LightningModule, step: int) -> None:
        """Append the batch's mean metrics at the current iterate, and keep its picture now and then."""
        assert isinstance(attack, Attack)
        images = attack.pixels(attack.dummy_images.detach())[self.row].cpu()
        images = images[assign(images.clamp(0, 1), self.images)]
        rows = fidelity(images, self.images)
        for name, values in self.history.items():
            numbers = [row[name] for row in rows if name in row]
            values.append(finite(sum(numbers) / len(numbers)) if numbers else None)
        self.last = to_uint8(images)
        if step in self.frame_steps:
            self.frames[step] = self.last


class Guard(pl.Callback):
    """Stops a trial that has diverged or outlasted its time; ``verdict`` says which."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.verdict: Status | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, attack: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(attack, Attack)
        largest = attack.dummy_images.detach().abs().amax()
        if not bool(attack.trace[-1].isfinite().all() & (largest < BLOW_UP)):  # also where it is NaN
            self.verdict = "diverged"
        elif time.monotonic() > self.deadline:
            self.verdict = "timeout"
        trainer.should_stop = self.verdict is not None


class Progress(pl.Callback):
    """Tells ``show(step, objective, psnr)`` after every step."""

    def __init__(self, judge: Judge, show: Callable[[int, float, float], None]) -> None:
        self.judge = judge
        self.show = show

    def on_train_batch_end(
        self, trainer: pl.Trainer, attack: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(attack, Attack)
        psnr = self.judge.history["psnr"][-1]
        self.show(
            batch_idx + 1, float(attack.trace[-1][self.judge.row]), float("nan") if psnr is None else psnr
        )


class TensorBoard(pl.Callback):
    """Scalars of every iterate, the evolution, and private beside reconstructed images."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def on_train_batch_end(
        self, trainer: pl.Trainer, attack: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(attack, Attack)
        writer = _writer(trainer)
        # the objective is that of the iterate before the step, the judge's metrics come after it
        writer.add_scalar("objective", attack.trace[-1][self.judge.row], batch_idx)
        for name, values in self.judge.history.items():
            for step in (0, 1) if batch_idx == 0 else (batch_idx + 1,):
                if (value := values[step]) is not None:
                    writer.add_scalar(name, value, step)

    def on_fit_end(self, trainer: pl.Trainer, attack: pl.LightningModule) -> None:
        assert isinstance(attack, Attack)
        writer = _writer(trainer)
        for step, frame in self.judge.frames.items():
            writer.add_images("evolution", frame, step, dataformats="NHWC")
        found = attack.result.images[self.judge.row]
        found = found[assign(found.clamp(0, 1), self.judge.images)]
        pair = np.concatenate([to_uint8(self.judge.images), to_uint8(found)], axis=2)
        writer.add_images("private_and_reconstruction", pair, max(self.judge.frames), dataformats="NHWC")


def frame_steps(steps: int) -> tuple[int, ...]:
    """At which steps the evolution keeps a frame: denser at the start, where most happens."""
    return tuple(sorted({round(steps * (i / (FRAMES - 1)) ** 2) for i in range(FRAMES)}))


def to_uint8(images: Tensor) -> Pixels:
    """Images ``(image, channel, height, width)`` as 8-bit ``(image, height, width, channel)``."""
    scaled = images.nan_to_num(nan=0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    array: Pixels = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return array


def _writer(trainer: pl.Trainer) -> Any:
    assert isinstance(trainer.logger, TensorBoardLogger)
    return trainer.logger.experiment
