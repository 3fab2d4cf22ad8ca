"""Batches spread over processes, against the same batch in this one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from dlgbench import processes, provenance, trial
from dlgbench.case import Case
from dlgbench.compiler import Compiler
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.trial import BatchFailed, Setup

CASE = Case(
    network=NETWORKS.spec("lenet_dlg"), dataset=DATASETS.spec("photos"), attack=ATTACKS.spec("dlg"),
    defense=DEFENSES.spec("none"), batch=1, resolution=32, preparation="fit", channels=3, classes=10,
    steps=2, dtype="float64", image=0, seed=0,
)  # fmt: skip
CASES = [replace(CASE, image=image) for image in range(3)]
PHOTOS = DATASETS.make(CASE.dataset, None)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, and no batch too short for them."""
    monkeypatch.setattr(processes, "_cores", lambda: 2)
    monkeypatch.setattr(processes, "MANY", 1)


@pytest.mark.usefixtures("two")
def test_two_processes_find_what_one_finds() -> None:
    shown: list[tuple[int, float, float]] = []
    setup = Setup("cpu")
    spread = processes.run(CASES, PHOTOS, setup, lambda *progress: shown.append(progress))
    alone = trial.run(CASES, PHOTOS, setup, lambda *progress: None)
    for (ours, _), (theirs, _) in zip(spread, alone, strict=True):
        assert ours.case == theirs.case
        assert ours.images[0]["mse"] == pytest.approx(theirs.images[0]["mse"], rel=1e-6)
        assert ours.closures == theirs.closures
        assert ours.provenance["threads"] == 1
    assert {ours.cost["trials_in_batch"] for ours, _ in spread} == {1, 2}
    assert shown[-1][0] == CASE.steps


@pytest.mark.usefixtures("two")
def test_children_that_are_done_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[processes._Child] = []

    class Noted(processes._Child):
        def __init__(self, *work: Any) -> None:
            super().__init__(*work)
            children.append(self)

    monkeypatch.setattr(processes, "_Child", Noted)
    processes.run(CASES, PHOTOS, Setup("cpu"), lambda *progress: None)
    assert [child.process.exitcode for child in children] == [0, 0]  # ended by a signal it is -15


@pytest.mark.usefixtures("two")
def test_what_fails_in_a_child_fails_the_batch() -> None:
    impossible = [replace(case, channels=2) for case in CASES]
    with pytest.raises(BatchFailed):
        processes.run(impossible, PHOTOS, Setup("cpu"), lambda *progress: None)


def test_short_batches_and_deep_networks_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[Sequence[Case]] = []
    monkeypatch.setattr(trial, "run", lambda cases, *rest: here.append(cases))
    deep = replace(CASE, network=NETWORKS.spec("resnet18"), resolution=224, steps=30_000)
    processes.run(CASES, PHOTOS, Setup("cpu"), lambda *progress: None)
    processes.run([deep], PHOTOS, Setup("cpu"), lambda *progress: None)
    assert here == [CASES, [deep]]


def test_a_processor_gets_a_batch_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_cores", lambda: 3)
    cpu = torch.device("cpu")
    assert processes.batch_size(CASE, cpu) == 3 * trial.batch_size(CASE, cpu)
    assert processes.batch_size(replace(CASE, resolution=224), cpu) == 1


@pytest.fixture
def pipe() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = Pipe(duplex=False)
    yield ours, theirs
    ours.close()


def test_a_child_that_is_killed_fails_the_batch(pipe: tuple[Connection, Connection]) -> None:
    pipe[1].close()
    with pytest.raises(BatchFailed):
        processes._gather([pipe[0]], Compiler(), lambda *progress: None)


def test_a_childs_complaint_about_the_compiler_is_told_here(pipe: tuple[Connection, Connection]) -> None:
    told: list[str] = []
    compiler = Compiler("auto", told.append)
    pipe[1].send("no compiler")
    pipe[1].send([])
    processes._gather([pipe[0]], compiler, lambda *progress: None)
    assert told == ["no compiler"]
    assert compiler.broken


def test_the_slowest_child_is_shown() -> None:
    shown: list[tuple[int, float, float]] = []
    pipes = [Pipe(duplex=False) for _ in range(2)]
    for (_, theirs), steps in zip(pipes, (2, 1), strict=True):
        for step in range(1, steps + 1):
            theirs.send((step, 0.5, 9.0))
        theirs.send([])
    found = processes._gather([ours for ours, _ in pipes], Compiler(), lambda *p: shown.append(p))
    assert found == [[], []]
    assert {step for step, *_ in shown} == {1}


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    assert processes._cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert processes._cores() == 4


def test_the_cores_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(provenance, "free_memory", lambda device: 2e8)
    assert 1 < trial.batch_size(CASE, cpu, 64) == trial.batch_size(CASE, cpu) < trial.BATCH_CALLS * 2
