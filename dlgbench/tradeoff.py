"""Records → what every defence prevents and what it costs, each scored by the strongest attack it met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from dlgbench import leaderboard
from dlgbench.case import Case
from dlgbench.leaderboard import Row
from dlgbench.records import Manifest, Record
from dlgbench.registry import DEFENSES, NETWORKS
from dlgbench.text import printable

Key = tuple[Any, ...]
SAME = ("network", "dataset", "defense", "resolution", "preparation", "channels", "classes", "dtype")
"""The fields in which what is attacked and what is trained must agree."""


@dataclass(frozen=True)
class Rate:
    """How many trials of an attack recovered every image, with the 95 % Wilson interval."""

    attack: str
    recovered: int
    trials: int
    interval: tuple[float, float]
    partly: int
    """Of the others, how many come nearer than a trivial baseline."""
    identified: int | None
    psnr: float | None
    """As `leaderboard.Row`'s, both."""

    @property
    def risk(self) -> float:
        """How large the share may be of what leaks: of trials recovered or, if they are more, identified."""
        return leaderboard.wilson(max(self.recovered, self.identified or 0), self.trials)[1]


@dataclass(frozen=True)
class Tradeoff:
    """One network with one defence.  None is what was not measured or does not exist."""

    name: str
    defense: str
    dataset: str
    batch: int
    resolution: int
    naive: Rate | None = None
    """Of the strongest attack that does not know of the defence."""
    adaptive: Rate | None = None
    """Of the strongest that does."""
    psnr: float | None = None
    """Of the stronger of the two, as `leaderboard.Row`'s; so are the next two."""
    pearson_quarter: float | None = None
    label_accuracy: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    accuracy: float | None = None
    """Of what was trained with it, on images kept back, the mean over seeds."""
    lost: float | None = None
    """How much less that is than without a defence, the mean over pairs of the same seed."""
    lost_interval: tuple[float, float] | None = None
    """The 95 % interval of Student's t."""
    trainings: int = 0
    update_seconds: float | None = None
    slower: float | None = None
    """How many times as long an update takes as without a defence."""
    update_bytes: float | None = None
    trials: int = 0
    planned: int = 0
    broken: int = 0
    """Of attacks and trainings: what did not run to a result says nothing for the defence."""
    reason: str = ""
    """Why something was skipped."""

    trivial = False

    @property
    def partial(self) -> bool:
        """Whether planned trials are missing."""
        return self.trials < self.planned

    @property
    def title(self) -> str:
        """The defence, and how many images its gradient is of, if several."""
        return self.defense + (f", {self.batch} images" if self.batch > 1 else "")

    @property
    def strongest(self) -> Rate | None:
        """What the defence is scored by: the attack that finds more, if any ran."""
        return max(self.rates, key=_strength, default=None)

    @property
    def rates(self) -> list[Rate]:
        """Those of the attacks that ran."""
        return [rate for rate in (self.naive, self.adaptive) if rate and rate.trials]


def table(manifest: Manifest, records: Mapping[str, Record]) -> list[Tradeoff]:
    """One row per network, data, batch and defence, by what leaks least; empty where nothing was trained."""
    trained: dict[Key, list[Case]] = {}
    attacked: dict[Key, list[Case]] = {}
    for case in manifest.cases:
        groups, batch = (trained, 0) if case.trains else (attacked, case.batch)
        groups.setdefault((*subject(case), batch), []).append(case)
    found = [_tradeoff(group, trained, records) for group in attacked.values() if trained]
    return sorted(found, key=_rank)


def subject(case: Case) -> Key:
    """What an attack and a training have in common."""
    identity = case.identity()
    return tuple(str(identity[name]) for name in SAME)


def _tradeoff(
    cases: Sequence[Case], trained: Mapping[Key, Sequence[Case]], records: Mapping[str, Record]
) -> Tradeoff:
    def recorded(some: Sequence[Case]) -> list[Record]:
        return [records[case.id] for case in some if case.id in records]

    case, ran = cases[0], recorded(cases)
    naive, adaptive = (_strongest([r for r in ran if r.case.adapts == knows]) for knows in (False, True))
    best = max(filter(None, (naive, adaptive)), key=_strength, default=None)
    training = trained.get((*subject(case), 0), [])
    plain = trained.get((*subject(replace(case, defense=DEFENSES.spec("none"))), 0), [])
    costs = recorded(training)
    reasons = [printable(record.reason) for record in (*ran, *costs) if record.status == "skipped"]
    return Tradeoff(
        name=printable(NETWORKS.brief(case.network)), defense=printable(DEFENSES.brief(case.defense)),
        **leaderboard.input_of(case), naive=_rate(naive), adaptive=_rate(adaptive),
        psnr=best.psnr if best else None, pearson_quarter=best.pearson_quarter if best else None,
        label_accuracy=best.label_accuracy if best else None,
        **_cost(costs, recorded(plain)),
        trials=len(ran) + len(costs), planned=len(cases) + len(training),
        broken=sum(record.broken for record in (*ran, *costs)), reason=next(iter(reasons), ""),
    )  # fmt: skip


def _strongest(records: Sequence[Record]) -> Row | None:
    ran = [row for row in leaderboard.rows(records) if not row.trivial and not row.reason]
    return max(ran, key=_strength, default=None)


def _strength(one: Row | Rate) -> Key:
    psnr = -math.inf if one.psnr is None else one.psnr
    return one.recovered / one.trials, one.partly / one.trials, psnr


def _rate(row: Row | None) -> Rate | None:
    shared = ("attack", "recovered", "trials", "interval", "partly", "identified", "psnr")
    return Rate(*(getattr(row, name) for name in shared)) if row else None


def _cost(defended: Sequence[Record], plain: Sequence[Record]) -> dict[str, Any]:
    """The fields of a `Tradeoff` that tell what ``defended`` costs beside ``plain`` trainings."""
    ours, theirs = (
        {(r.case.image, r.case.seed): r.utility for r in some if r.utility and not r.broken}
        for some in (defended, plain)
    )
    if not ours:
        return {}
    lost = [theirs[pair]["accuracy"] - ours[pair]["accuracy"] for pair in ours if pair in theirs]
    seconds, without = (_median(some.values(), "update_seconds") for some in (ours, theirs))
    one = next(iter(ours.values()))
    return {
        "accuracy": fmean(each["accuracy"] for each in ours.values()), "trainings": len(ours),
        "lost": fmean(lost) if lost else None, "lost_interval": interval(lost),
        "update_seconds": seconds, "slower": seconds / without if seconds and without else None,
        "update_bytes": _median(ours.values(), "update_bytes"),
        "epsilon": one["epsilon"], "delta": one["delta"],
    }  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean (Student 1908), None of fewer than two values."""
    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def _median(costs: Iterable[Mapping[str, Any]], name: str) -> float | None:
    return leaderboard.middle(cost[name] for cost in costs)


def _rank(row: Tradeoff) -> Key:
    best = row.strongest
    rate = best.recovered / best.trials if best else math.inf
    lost = math.inf if row.lost is None else row.lost
    return row.name, row.dataset, row.batch, rate, lost, row.defense
