"""Cases not yet recorded → trials → records."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from dlgbench import processes, trial
from dlgbench.case import Case
from dlgbench.grid import Data, why_not
from dlgbench.records import Record
from dlgbench.store import Store
from dlgbench.trial import Setup


class Watch(Protocol):
    """Whoever shows the progress of a run."""

    def begin(self, cases: Sequence[Case]) -> None: ...

    def step(self, step: int, objective: float, psnr: float) -> None: ...

    def end(self, records: Sequence[Record]) -> None: ...


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


def pending(cases: Sequence[Case], found: Mapping[str, Record], limits: Limits, data: Data) -> list[Case]:
    """The cases that a run has to compute; of those that were skipped, the ones that no longer need be."""

    def settled(case: Case) -> bool:
        record = found.get(case.id)
        if record is None or (record.broken and limits.retry_failed):
            return False
        return record.status != "skipped" or record.reason == why_not(case, data)

    return [case for case in cases if limits.force or not settled(case)]


def run(
    todo: Sequence[Case], store: Store, data: Data, setup: Setup, limits: Limits, watch: Watch
) -> Summary:
    """Run the cases in batches of those that are alike.

    A case that another process has recorded meanwhile is passed over.  A trial that the end of the
    run's time cuts short leaves no record: it is repeated by the next run.
    """
    summary, deadline = Summary(), time.monotonic() + limits.seconds
    device = trial.device_of(setup.accelerator)
    for refused, group in _groups(todo, data):
        waiting, most = group, len(group) if refused else processes.batch_size(group[0], device)
        while waiting and not summary.out_of_time:
            left = deadline - time.monotonic()
            batch = pending(waiting[:most], store.load(waiting[:most])[0], limits, data)
            bounded = replace(setup, timeout=min(setup.timeout, left))
            try:
                ended = (
                    _batch(batch, refused, len(waiting), data, bounded, watch) if batch and left > 0 else []
                )
            except trial.BatchFailed:
                most = -(-len(batch) // 2)
                continue
            waiting = waiting[most:]
            cut = [r.status == "timeout" and time.monotonic() > deadline for r, _ in ended]
            summary.out_of_time = left <= 0 or any(cut)
            whole = [one for one, is_cut in zip(ended, cut, strict=True) if not is_cut]
            for record, pictures in whole:
                store.put(record, pictures)
            summary.computed += [record for record, _ in whole]
            watch.end([record for record, _ in whole])
    return summary


def _groups(cases: Sequence[Case], data: Data) -> list[tuple[str | None, list[Case]]]:
    """Cases whose attacks are the same function of what leaks, in the order of their first, and why they
    cannot be run if so: of one such function some defences may lack a package."""
    groups: dict[tuple[Case, str | None], list[Case]] = {}
    for case in cases:
        groups.setdefault((trial.alike(case), why_not(case, data)), []).append(case)
    return [(refused, group) for (_, refused), group in groups.items()]


def _batch(
    batch: Sequence[Case], refused: str | None, waiting: int, data: Data, setup: Setup, watch: Watch
) -> list[trial.Trial]:
    watch.begin(batch)
    if refused:
        return [(Record(case=case, status="skipped", reason=refused), b"") for case in batch]
    return processes.run(batch, data(batch[0].dataset), setup, watch.step, waiting)
