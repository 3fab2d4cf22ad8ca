"""Cases not yet recorded → trials → records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from dlgbench import trial
from dlgbench.case import Case
from dlgbench.grid import Data, why_not
from dlgbench.records import Record
from dlgbench.store import Store
from dlgbench.trial import Setup


class Watch(Protocol):
    """Whoever shows the progress of a run."""

    def begin(self, case: Case) -> None: ...

    def step(self, case: Case, step: int, objective: float, psnr: float) -> None: ...

    def end(self, record: Record) -> None: ...


@dataclass(frozen=True)
class Limits:
    """What to compute again, and when to stop."""

    force: bool = False
    retry_failed: bool = False
    seconds: float = float("inf")
    """For the whole run."""


@dataclass
class Summary:
    """How a run ended."""

    computed: list[Record] = field(default_factory=list)
    out_of_time: bool = False


def pending(cases: Sequence[Case], found: dict[str, Record], limits: Limits) -> list[Case]:
    """The cases that a run has to compute."""

    def settled(case: Case) -> bool:
        record = found.get(case.id)
        return record is not None and not (limits.retry_failed and record.broken)

    return [case for case in cases if limits.force or not settled(case)]


def run(
    todo: Sequence[Case], store: Store, data: Data, setup: Setup, limits: Limits, watch: Watch
) -> Summary:
    """Run the cases one after the other, saving each as it ends.

    A case that another process has recorded meanwhile is passed over.  A trial that the end of the
    run's time cuts short leaves no record: it is repeated by the next run.
    """
    summary, deadline = Summary(), time.monotonic() + limits.seconds
    for case in todo:
        left = deadline - time.monotonic()
        if left <= 0:
            summary.out_of_time = True
            break
        if not pending([case], store.load([case])[0], limits):
            continue
        watch.begin(case)
        record, pictures = _one(case, data, replace(setup, timeout=min(setup.timeout, left)), watch)
        if record.status == "timeout" and time.monotonic() > deadline:
            summary.out_of_time = True
            break
        store.put(record, pictures)
        summary.computed.append(record)
        watch.end(record)
    return summary


def _one(case: Case, data: Data, setup: Setup, watch: Watch) -> tuple[Record, bytes]:
    if reason := why_not(case, data):
        return Record(case=case, status="skipped", reason=reason), b""
    return trial.run(case, data(case.dataset), setup, lambda *progress: watch.step(case, *progress))
