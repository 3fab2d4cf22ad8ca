"""One batch of cases spread over processes of one thread: small networks leave all other cores idle."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from dlgbench import trial
from dlgbench.case import Case
from dlgbench.compiler import Compiler
from dlgbench.datasets import Dataset
from dlgbench.trial import BatchFailed, Setup, Trial
from dlgbench.utility import Show

MANY = 20_000
"""Closures that repay starting processes, which takes some 5 s: about 15 s of LeNet."""
GRACE = 10
"""Seconds for a process that is done to tidy up: one ended before leaves locks that Python warns of."""
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def batch_size(case: Case, device: torch.device) -> int:
    """How many cases like this one to run at once: on a CPU, as many a core as one process would take."""
    return trial.batch_size(case, device, _cores() if device.type == "cpu" else 1)


def run(cases: Sequence[Case], dataset: Dataset, setup: Setup, show: Show, waiting: int = 0) -> list[Trial]:
    """What `trial.run` does, by as many processes as there are cores where that pays."""
    device = trial.device_of(setup.accelerator)
    small = device.type == "cpu" and trial.call_width(cases[0], device) > 1
    many = len(cases) * trial.most_closures(cases[0]) >= MANY
    count = min(_cores(), len(cases)) if small and many else 1
    if count == 1:
        return trial.run(cases, dataset, setup, show, waiting)
    theirs = replace(setup, compiler=setup.compiler.elsewhere())
    children: list[_Child] = []
    try:
        children.extend(_Child(cases[part::count], dataset, theirs, waiting) for part in range(count))
        parts = _gather([child.pipe for child in children], setup.compiler, show)
        for child in children:
            child.process.join(GRACE)
    finally:
        for child in children:
            child.end()
    return [parts[index % count][index // count] for index in range(len(cases))]


class _Child:
    """A process that runs some cases; what it has to say comes through ``pipe``."""

    def __init__(self, *work: Any) -> None:
        context = cast(Any, multiprocessing.get_context(METHOD))
        if METHOD == "forkserver":
            context.set_forkserver_preload([trial.__name__])
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(theirs, *work))
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _work(parent: Connection, cases: Sequence[Case], dataset: Dataset, setup: Setup, waiting: int) -> None:
    """In the child: its progress, the compiler's complaint if there is one, and its trials, to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which the parent gets too: it ends us
    trial.quieten()
    torch.set_num_threads(1)
    setup.compiler.tell = parent.send
    try:
        parent.send(trial.run(cases, dataset, setup, lambda *progress: parent.send(progress), waiting))
    except BatchFailed as failed:
        parent.send(failed)


def _gather(pipes: Sequence[Connection], compiler: Compiler, show: Show) -> list[list[Trial]]:
    """The trials of every child, in the order of ``pipes``; shown is the slowest child's progress."""
    progress: dict[Connection, tuple[int, float, float]] = {}
    ended: dict[Connection, list[Trial]] = {}
    while len(ended) < len(pipes):
        for pipe in cast(list[Connection], wait([pipe for pipe in pipes if pipe not in ended])):
            try:
                message = pipe.recv()
            except EOFError as error:  # it was killed, most likely for its memory
                raise BatchFailed from error
            if isinstance(message, BatchFailed):
                raise message
            if isinstance(message, str):  # also where one closure is wrong: each batch would make it anew
                compiler.give_up(message)
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
