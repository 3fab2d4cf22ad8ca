"""Trials: cases that can share a batch, their clients, attack and judge → records and pictures."""

from __future__ import annotations

import logging
import math
import shutil
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from dlgbench import provenance, utility
from dlgbench.attacks.base import Attack, Task
from dlgbench.callbacks import Guard, Judge, Progress, Screen, TensorBoard, lowest
from dlgbench.case import Case, stream
from dlgbench.closures import width_for
from dlgbench.compiler import Compiler
from dlgbench.datasets import Dataset
from dlgbench.leak import Leak, Secret, stack
from dlgbench.lineup import lineup
from dlgbench.prepare import Network
from dlgbench.records import Record, Status
from dlgbench.registry import ATTACKS, DEFENSES, Value
from dlgbench.scoring import finals, pictures, score
from dlgbench.utility import Show
from dlgbench.victims import leak_of, network_of, secret_of, trained_network_of

T = TypeVar("T")
SCREENED = 10
"""After one in so many steps only the best start of a case goes on, unless starts cooperate."""

Trial = tuple[Record, bytes]
"""A record and its pictures: an ``npz`` file, empty where there are none."""


@dataclass(frozen=True)
class Setup:
    """Where and how trials run: nothing here may change a result beyond rounding."""

    accelerator: str = "auto"
    timeout: float = float("inf")
    """Seconds that a batch of trials may take."""
    tensorboard: Path | None = None
    compiler: Compiler = field(default_factory=Compiler)


class Frozen:
    """A data loader that yields the same leak at every step."""

    def __init__(self, leak: Leak, steps: int) -> None:
        self.leak = leak
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Leak]:
        return repeat(self.leak, self.steps)


class BatchFailed(Exception):
    """A batch of several cases failed: fewer at a time may have room, or leave the fault to one."""


BATCH_CALLS = 16
"""A batch of cases is what so many calls of their closure take: as rows end, calls fall away."""


def call_width(case: Case, device: torch.device) -> int:
    """How many cases like this one a call of their closure takes."""
    together = 1 if case.trains else case.batch
    return width_for(together * case.resolution**2, device)


def most_closures(case: Case) -> int:
    """How many closures a trial evaluates at most, but for line searches."""
    return case.steps * int(case.attack.get("iterations") or 1)


def batch_size(case: Case, device: torch.device, processes: int = 1) -> int:
    """How many cases like this one to run at once, if half of the free memory holds them."""
    width = call_width(case, device)
    if width == 1:
        return 1
    pairs = 2 * int(case.attack.get("history") or 0) * math.prod(case.shape)
    weights = sum(parameter.numel() for parameter in network_of(case).parameters())
    needed = getattr(torch, case.dtype).itemsize * (pairs + 4 * weights)
    rows = min(BATCH_CALLS * width * processes, provenance.free_memory(device) / 2 // needed)
    return int(max(1, rows // case.starts))


def run(cases: Sequence[Case], dataset: Dataset, setup: Setup, show: Show, waiting: int = 0) -> list[Trial]:
    """Run cases that are `alike` in one batch.

    ``waiting`` counts these and all later cases that will use the same closure.  Whatever fails in a
    single trial becomes a record of the failure; for several it raises `BatchFailed`.
    """
    device = device_of(setup.accelerator)
    provenance.exact_float32()
    try:
        if cases[0].trains:
            return [(record, b"") for record in utility.run(cases, dataset, device, setup.timeout, show)]
        return _run(cases, dataset, setup, device, show, waiting)
    except Exception as error:  # recorded as a failure, counted in every table, and the exit code is 1
        if len(cases) > 1:
            raise BatchFailed from error
        return [(_failure(cases[0], error, device), b"")]


def _run(
    cases: Sequence[Case], dataset: Dataset, setup: Setup, device: torch.device, show: Show, waiting: int
) -> list[Trial]:
    secrets = [secret_of(case, dataset) for case in cases]
    networks = [trained_network_of(case, dataset) for case in cases]
    attack, leak = prepared(cases, networks, secrets, device)
    starts, steps = cases[0].starts, cases[0].steps
    calls = most_closures(cases[0]) * -(-waiting * starts // attack.closure.width)
    compiling = setup.compiler.prepare(attack.closure, identity(cases[0]), attack.example(leak), calls)
    judge, guard = Judge(_each(secrets, starts), steps), Guard(len(cases) * starts, setup.timeout)
    loggers = _loggers(cases, setup.tensorboard) if setup.tensorboard else []
    boards = [TensorBoard(judge, loggers)] if loggers else []
    meter = provenance.Meter(device)
    screen = Screen(starts, steps if attack.cooperative else -(-steps // SCREENED))
    trainer = trainer_on(setup.accelerator, [judge, guard, Progress(judge, show), *boards, screen])
    leak = attack.closure.arranged(leak)
    trainer.fit(attack, Frozen(leak, steps))
    cost = {**meter.stop(len(cases)), **compiling}
    whence = {**provenance.facts(device), **_known(cases[0]), **attack.closure.facts}
    rows, others = lowest(attack.result.objective, starts), lineup(cases[0], dataset)
    records = [
        replace(score(case, attack, judge, row, guard.verdicts[row], others), cost=cost, provenance=whence)
        for row, case in zip(rows, cases, strict=True)
    ]
    if loggers:
        _finish(loggers, rows, records)
    return [(r, pictures(judge, attack.result, row)) for row, r in zip(rows, records, strict=True)]


def prepared(
    cases: Sequence[Case], networks: Sequence[Network], secrets: Sequence[Secret], device: torch.device
) -> tuple[Attack, Leak]:
    """The attack on some cases, with a network whose own weights no one uses, and what the clients shared.

    Every start of every case is a row, those of a case after one another.
    """
    clients = zip(cases, (network.to(device) for network in networks), secrets, strict=True)
    leaks = [leak_of(*client, device) for client in clients]
    return attack_on(cases, networks[0]), stack(_each(leaks, cases[0].starts))


def attack_on(cases: Sequence[Case], network: Network) -> Attack:
    """The attack of some cases, every start with the attacker's own randomness."""
    purposes = ["attack", *(f"attack {start}" for start in range(1, cases[0].starts))]
    generators = [torch.Generator().manual_seed(stream(case, one)) for case in cases for one in purposes]
    defense = DEFENSES.make(cases[0].defense)
    task = Task(*cases[0].shape, cases[0].classes, generators, cases[0].starts, defense)
    attack: Attack = ATTACKS.make(cases[0].attack, network, task)
    return attack


def _failure(case: Case, error: Exception, device: torch.device) -> Record:
    place = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    status: Status = "oom" if full else "error"  # the last is what torch's CPU allocator says
    return Record(case=case, status=status, reason=reason, provenance=provenance.facts(device))


def alike(case: Case) -> Case:
    """The same for all cases that can share a batch: their attack is one function of what leaks."""
    told = case.adapts or "rebuilds" in DEFENSES.entry(case.defense.name).facts
    defense = case.defense if told else DEFENSES.spec("none")
    return replace(case, image=0, seed=0, data="", defense=defense)


def identity(case: Case) -> str:
    """What the code of a closure depends on, of all that a case says."""
    parts = (case.network, case.attack, alike(case).defense, case.shape, case.classes, case.dtype)
    return " ".join(map(str, parts))


def _known(case: Case) -> dict[str, Any]:
    """What the attack presumes and what it met, for the record's provenance."""
    facts = ATTACKS.entry(case.attack.name).facts
    weights = f"trained for {case.epochs} epochs" if case.epochs else "untrained"
    return {"labels": facts["labels"], "priors": facts["priors"], "weights": weights}


def device_of(accelerator: str) -> torch.device:
    """The device that Lightning chooses; raises what it raises where there is none."""
    return trainer_on(accelerator, []).strategy.root_device


def quieten() -> None:
    """Silence the advice, notices and deprecations of Lightning: they are for who writes training loops."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric|lightning_utilities")


def trainer_on(accelerator: str, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A Trainer that runs one epoch, one step a batch, and adds nothing of its own.

    ``auto`` is CUDA or the CPU: Lightning's own would also take devices that know no float64.
    """
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return pl.Trainer(
        accelerator=accelerator, devices=1, max_epochs=1, logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def _each(values: Sequence[T], times: int) -> list[T]:
    """Every value so often, one after another."""
    return [value for value in values for _ in range(times)]


def _loggers(cases: Sequence[Case], folder: Path) -> list[TensorBoardLogger]:
    """One for every row, named by the case's id and, behind the first, the start."""
    names = [f"{case.id}-{start}" if start else case.id for case in cases for start in range(case.starts)]
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)  # what a killed trial left would be drawn twice
    return [TensorBoardLogger(folder, name="", version=name, default_hp_metric=False) for name in names]


def _finish(loggers: Sequence[TensorBoardLogger], rows: Sequence[int], records: Sequence[Record]) -> None:
    for row, record in zip(rows, records, strict=True):
        final = {f"final/{name}": value for name, value in finals(record).items()}
        loggers[row].log_hyperparams(_flat(record.case), final)
    for logger in loggers:
        logger.finalize("success")


def _flat(case: Case) -> dict[str, Value]:
    """The case as TensorBoard's hparams: strings and numbers only."""
    return {
        key: str(getattr(case, key)) if isinstance(value, dict) else value
        for key, value in case.plain().items()
    }
