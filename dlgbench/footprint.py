"""The memory that closures take, each measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from dlgbench import measure, provenance, trial
from dlgbench.compiler import Compiler
from dlgbench.measure import Row

HOARDING = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Read by glibc when a process starts, mallopt(3): the bytes that it keeps for later when they are freed."""
Result = TypeVar("Result")


def memory(networks: Sequence[str], compiler: Compiler) -> Iterator[Row]:
    """The most that one closure of every network holds at once: the textbook's against ours."""
    for network in networks:
        yield alone(_memory, network, compiler.elsewhere())


def alone(function: Callable[..., Result], *arguments: object) -> Result:
    """What ``function`` returns in a fresh process that gives memory back as soon as it is free.

    What a process keeps for later depends on all that it did before, and is a fifth of what a closure takes.
    """
    spawn = multiprocessing.get_context("spawn")
    with _thrifty_children(), ProcessPoolExecutor(1, spawn, initializer=_start) as pool:
        return pool.submit(function, *arguments).result()


def peak(function: Callable[[], object]) -> float:
    """Bytes that a call needs beside what is held already; 1 at least, NaN where nobody tells."""
    function()
    meter = provenance.Meter(measure.CPU)
    function()
    most = meter.stop()["peak_memory_bytes"]
    return float("nan") if most is None else max(1.0, float(most))


def _memory(network: str, compiler: Compiler) -> Row:
    case = measure.case(network)
    width, attack, example = measure.subject(network)
    compiler.prepare(attack.closure, trial.identity(case), example, 0)
    theirs = peak(measure.textbook(case).closure) / 1e6
    ours = peak(partial(attack.closure, *example)) / width / 1e6
    return {
        "network": network, "textbook MB": theirs, "ours MB": ours, "ratio": ours / theirs,
        "closure": attack.closure.facts["closure"],
    }  # fmt: skip


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which the parent gets too
    trial.quieten()
    provenance.exact_float32()


@contextmanager
def _thrifty_children() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in HOARDING}
    os.environ.update(dict.fromkeys(HOARDING, str(2**16)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
