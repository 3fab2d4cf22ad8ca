"""What watches an attack from outside: the judge, the guard, TensorBoard and the progress display."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
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
HISTORY = ("mse", "psnr", "ssim")
"""The metrics of every iterate."""
BLOW_UP = 1e3
"""An image with a pixel beyond this counts as diverged.  Measured on lenet_dlg, 30 trials
with torch's own L-BFGS: 9 passed it within 10 steps; let go on for 300, none found a better iterate.  Those
that recovered stayed below 5."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Judge(pl.Callback):
    """Holds the secrets of an attack's cases and measures every iterate of every case against its own."""

    def __init__(self, secrets: Sequence[Secret], steps: int) -> None:
        self.cases = [_Watched(secret) for secret in secrets]
        self.frame_steps = frame_steps(steps)

    def on_train_start(self, trainer: pl.Trainer, attack: pl.LightningModule) -> None:
        self.measure(attack, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, attack: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.measure(attack, batch_idx + 1)

    def on_train_end(self, trainer: pl.Trainer, attack: pl.LightningModule) -> None:
        for case in self.cases:
            case.frames[len(case.history["mse"]) - 1] = case.last  # also where the trial stopped early

    def measure(self, attack: pl.LightningModule, step: int) -> None:
        """Append the mean metrics of every active case's batch, and keep a picture now and then."""
        assert isinstance(attack, Attack)
        images = attack.reconstructed(attack.dummy_images.detach()).cpu()
        active = [(self.cases[row], images[row]) for row in attack.active.nonzero().squeeze(1).tolist()]
        if not active:
            return
        ordered = [found[assign(found.clamp(0, 1), case.images)] for case, found in active]
        rows = fidelity(torch.cat(ordered), torch.cat([case.images for case, _ in active]), HISTORY)
        for number, (case, _) in enumerate(active):
            batch = len(case.images)
            case.note(ordered[number], rows[number * batch : (number + 1) * batch], step in self.frame_steps)


class _Watched:
    """What a judge knows and notes of one case."""

    def __init__(self, secret: Secret) -> None:
        self.images, self.labels = secret.images[0], secret.labels[0]
        self.history: dict[str, list[float | None]] = {name: [] for name in HISTORY}
        self.frames: dict[int, Pixels] = {}
        self.last = to_uint8(self.images)

    def note(self, images: Tensor, rows: Sequence[Mapping[str, float]], keep: bool) -> None:
        for name, values in self.history.items():
            numbers = [row[name] for row in rows if name in row]
            values.append(finite(sum(numbers) / len(numbers)) if numbers else None)
        self.last = to_uint8(images)
        if keep:
            self.frames[len(self.history["mse"]) - 1] = self.last


class Guard(pl.Callback):
    """Stops cases that have diverged, and all that outlast their time; ``verdicts`` say which."""

    def __init__(self, cases: int, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.verdicts: list[Status | None] = [None] * cases

    def late(self) -> bool:
        """Whether their time is over."""
        return time.monotonic() > self.deadline

    def on_train_start(self, trainer: pl.Trainer, attack: pl.LightningModule) -> None:
        assert isinstance(attack, Attack)
        attack.late = self.late

    def on_train_batch_end(
        self, trainer: pl.Trainer, attack: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(attack, Attack)
        largest = attack.matched(attack.dummy_images.detach()).flatten(1).abs().amax(1)
        sound = (attack.trace[-1].isfinite() & (largest < BLOW_UP)).cpu()  # where it is NaN: not sound
        late = self.late()
        for row in attack.active.nonzero().squeeze(1).tolist():
            self.verdicts[row] = ("timeout" if late else None) if sound[row] else "diverged"
            attack.active[row] = self.verdicts[row] is None
        trainer.should_stop = not bool(attack.active.any())


class Screen(pl.Callback):
    """After step ``after``, of every case's ``starts`` rows only that of the lowest objective goes on."""

    def __init__(self, starts: int, after: int) -> None:
        self.starts = starts
        self.after = after

    def on_train_batch_end(
        self, trainer: pl.Trainer, attack: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(attack, Attack)
        if self.starts > 1 and batch_idx + 1 == self.after:
            running = torch.where(attack.active, attack.trace[-1].cpu(), torch.inf)
            kept = torch.zeros_like(attack.active)
            kept[lowest(running, self.starts)] = True
            attack.active &= kept


def lowest(objective: Tensor, starts: int) -> list[int]:
    """Which row of every case's ``starts`` has the lowest objective, ``(row,)``; no number is the highest."""
    values = objective.nan_to_num(nan=torch.inf).view(-1, starts)
    best = values.argmin(1) + starts * torch.arange(len(values)).to(values.device)
    return [int(row) for row in best]


class Progress(pl.Callback):
    """Tells ``show(step, objective, psnr)`` after every step: the medians of the cases still running.

    Before the first step it is the objective of what is sought then, and no PSNR.
    """

    def __init__(self, judge: Judge, show: Callable[[int, float, float], None]) -> None:
        self.judge = judge
        self.show = show

    def on_train_start(self, trainer: pl.Trainer, attack: pl.LightningModule) -> None:
        assert isinstance(attack, Attack)
        attack.tell = lambda objective: self.show(0, objective, math.nan)

    def on_train_batch_end(
        self, trainer: pl.Trainer, attack: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(attack, Attack)
        running = [case for case in self.judge.cases if len(case.history["psnr"]) == batch_idx + 2]
        known = [value for case in running if (value := case.history["psnr"][-1]) is not None]
        self.show(
            batch_idx + 1,
            float(attack.trace[-1].nanmedian()),
            median(known) if known else math.nan,
        )


class TensorBoard(pl.Callback):
    """Scalars of every iterate, the evolution, and private beside reconstructed images, for every case."""

    def __init__(self, judge: Judge, loggers: Sequence[TensorBoardLogger]) -> None:
        self.watched = list(zip(judge.cases, loggers, strict=True))

    def on_train_batch_end(
        self, trainer: pl.Trainer, attack: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(attack, Attack)
        for objective, (case, logger) in zip(attack.trace[-1].tolist(), self.watched, strict=True):
            if len(case.history["mse"]) < batch_idx + 2:  # it has stopped
                continue
            # the objective is that of the iterate before the step, the judge's metrics come after it
            logger.experiment.add_scalar("objective", objective, batch_idx)
            for name, values in case.history.items():
                for step in (0, 1) if batch_idx == 0 else (batch_idx + 1,):
                    if (value := values[step]) is not None:
                        logger.experiment.add_scalar(name, value, step)

    def on_fit_end(self, trainer: pl.Trainer, attack: pl.LightningModule) -> None:
        assert isinstance(attack, Attack)
        for found, (case, logger) in zip(attack.result.images, self.watched, strict=True):
            for step, frame in case.frames.items():
                logger.experiment.add_images("evolution", frame, step, dataformats="NHWC")
            found = found[assign(found.clamp(0, 1), case.images)]
            pair = np.concatenate([to_uint8(case.images), to_uint8(found)], axis=2)
            logger.experiment.add_images(
                "private_and_reconstruction", pair, max(case.frames), dataformats="NHWC"
            )


def frame_steps(steps: int) -> tuple[int, ...]:
    """At which steps the evolution keeps a frame: denser at the start, where most happens."""
    return tuple(sorted({round(steps * (i / (FRAMES - 1)) ** 2) for i in range(FRAMES)}))


def to_uint8(images: Tensor) -> Pixels:
    """Images ``(image, channel, height, width)`` as 8-bit ``(image, height, width, channel)``."""
    scaled = images.nan_to_num(nan=0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    array: Pixels = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return array
