"""One trial: a case, its client, its attack and its judge → a record and its pictures."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from dlgbench import provenance
from dlgbench.attacks.base import Attack, Task
from dlgbench.callbacks import Guard, Judge, Progress, TensorBoard
from dlgbench.case import Case, stream
from dlgbench.datasets import Dataset
from dlgbench.leak import Leak
from dlgbench.prepare import Network
from dlgbench.records import Record, Status
from dlgbench.registry import ATTACKS, Value
from dlgbench.scoring import finals, pictures, score
from dlgbench.victims import leak_of, network_of, secret_of


@dataclass(frozen=True)
class Setup:
    """Where and how trials run: nothing here may change a result beyond rounding."""

    accelerator: str = "auto"
    timeout: float = float("inf")
    """Seconds that one trial may take."""
    tensorboard: Path | None = None


class Frozen:
    """A data loader that yields the same leak at every step."""

    def __init__(self, leak: Leak, steps: int) -> None:
        self.leak = leak
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Leak]:
        return repeat(self.leak, self.steps)


Show = Callable[[int, float, float], None]
"""Told the step, the objective and the PSNR (dB, NaN where undefined) after every step."""


def run(case: Case, dataset: Dataset, setup: Setup, show: Show) -> tuple[Record, bytes]:
    """Run one case; whatever fails inside the trial becomes a record of the failure.

    Returns the record and its pictures (an ``npz`` file, empty where there are none).
    """
    device = device_of(setup.accelerator)
    try:
        return _run(case, dataset, setup, device, show)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _failure(case, "oom", error, device), b""
    except Exception as error:  # recorded as a failure, counted in every table, and the exit code is 1
        full = "can't allocate memory" in str(error)  # what torch's CPU allocator says
        return _failure(case, "oom" if full else "error", error, device), b""


def _run(
    case: Case, dataset: Dataset, setup: Setup, device: torch.device, show: Show
) -> tuple[Record, bytes]:
    provenance.exact_float32()
    guard, logger = Guard(setup.timeout), _logger(case, setup.tensorboard)
    network = network_of(case).to(device)
    secret = secret_of(case, dataset)
    leak, judge = leak_of(case, network, secret, device), Judge(secret, case.steps)
    attack = attack_on(case, network)
    callbacks = [judge, guard, Progress(judge, show), *([TensorBoard(judge)] if logger else [])]
    meter = provenance.Meter(device)
    trainer_on(setup.accelerator, logger, callbacks).fit(attack, Frozen(leak, case.steps))
    cost = meter.stop()
    record = score(case, attack, judge, guard.verdict)
    known = {name: ATTACKS.entry(case.attack.name).facts[name] for name in ("labels", "priors")}
    record = replace(record, cost=cost, provenance={**provenance.facts(device), **known})
    if logger:
        logger.log_hyperparams(_flat(case), {f"final/{key}": value for key, value in finals(record).items()})
        logger.finalize("success")
    return record, pictures(judge, attack.result)


def attack_on(case: Case, network: Network) -> Attack:
    """The attack of one case, with the attacker's own randomness."""
    generator = torch.Generator().manual_seed(stream(case, "attack"))
    attack: Attack = ATTACKS.make(case.attack, network, Task(*case.shape, case.classes, [generator]))
    return attack


def _failure(case: Case, status: Status, error: BaseException, device: torch.device) -> Record:
    place = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return Record(case=case, status=status, reason=reason, provenance=provenance.facts(device))


def device_of(accelerator: str) -> torch.device:
    """The device that Lightning chooses; raises what it raises where there is none."""
    return trainer_on(accelerator, None, []).strategy.root_device


def trainer_on(
    accelerator: str, logger: TensorBoardLogger | None, callbacks: list[pl.Callback]
) -> pl.Trainer:
    """A Trainer that runs one epoch, one step a batch, and adds nothing of its own."""
    return pl.Trainer(
        accelerator=accelerator, devices=1, max_epochs=1, logger=logger or False, callbacks=callbacks,
        log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def _logger(case: Case, folder: Path | None) -> TensorBoardLogger | None:
    if folder is None:
        return None
    shutil.rmtree(folder / case.id, ignore_errors=True)  # what a killed trial left would be drawn twice
    return TensorBoardLogger(folder, name="", version=case.id, default_hp_metric=False)


def _flat(case: Case) -> dict[str, Value]:
    """The case as TensorBoard's hparams: strings and numbers only."""
    return {
        key: str(getattr(case, key)) if isinstance(value, dict) else value
        for key, value in case.plain().items()
    }
