"""One batch of cases spread over processes of one thread: small networks leave all other cores idle."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from dlgbench import trial
from dlgbench.case import Case
from dlgbench.compiler import Compiler
from dlgbench.datasets import Dataset
from dlgbench.trial import Crowded, Setup, Show, Trial

MANY = 20_000
"""Closures that repay starting processes, which takes some 5 s: about 15 s of LeNet."""
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def batch_size(case: Case, device: torch.device) -> int:
    """How many cases like this one to run at once: on a CPU, one batch a core."""
    most = trial.batch_size(case, device)
    return most if most == 1 or device.type != "cpu" else most * _cores()


def run(cases: Sequence[Case], dataset: Dataset, setup: Setup, show: Show, waiting: int = 0) -> list[Trial]:
    """What `trial.run` does, by as many processes as there are cores where that pays."""
    device = trial.device_of(setup.accelerator)
    calls = len(cases) * cases[0].steps * int(cases[0].attack.get("iterations") or 1)
    small = device.type == "cpu" and trial.batch_size(cases[0], device) > 1
    count = min(_cores(), len(cases)) if small and calls >= MANY else 1
    if count == 1:
        return trial.run(cases, dataset, setup, show, waiting)
    context = cast(Any, multiprocessing.get_context(METHOD))
    if METHOD == "forkserver":
        context.set_forkserver_preload([trial.__name__])
    quiet = replace(setup, compiler=Compiler(setup.compiler.mode))
    quiet.compiler.broken = setup.compiler.broken
    children = {}
    try:
        for part in range(count):
            ours, theirs = context.Pipe(duplex=False)
            work = (theirs, cases[part::count], dataset, quiet, waiting)
            child = context.Process(target=_work, args=work)
            child.start()
            theirs.close()
            children[ours] = child
        parts = _gather(list(children), setup.compiler, show)
        return [parts[index % count][index // count] for index in range(len(cases))]
    finally:
        for child in children.values():
            child.terminate()
            child.join()


def _work(parent: Connection, cases: Sequence[Case], dataset: Dataset, setup: Setup, waiting: int) -> None:
    """In the child: its progress, the compiler's complaint if there is one, and its trials, to the parent."""
    trial.quieten()
    torch.set_num_threads(1)
    setup.compiler.tell = parent.send
    try:
        parent.send(trial.run(cases, dataset, setup, lambda *progress: parent.send(progress), waiting))
    except Crowded as crowded:
        parent.send(crowded)


def _gather(pipes: Sequence[Connection], compiler: Compiler, show: Show) -> list[list[Trial]]:
    """The trials of every child, in the order of ``pipes``; shown is the slowest child's progress."""
    progress: dict[Connection, tuple[int, float, float]] = {}
    ended: dict[Connection, list[Trial]] = {}
    while len(ended) < len(pipes):
        for pipe in cast(list[Connection], wait([pipe for pipe in pipes if pipe not in ended])):
            try:
                message = pipe.recv()
            except EOFError as error:  # it was killed, most likely for its memory
                raise Crowded from error
            if isinstance(message, Crowded):
                raise message
            if isinstance(message, str):
                compiler.broken = True
                compiler.tell(message)
            elif isinstance(message, tuple):
                progress[pipe] = message
                running = [value for other, value in progress.items() if other not in ended]
                show(*min(running, key=lambda value: value[0]))
            else:
                ended[pipe] = message
    return [ended[pipe] for pipe in pipes]


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
