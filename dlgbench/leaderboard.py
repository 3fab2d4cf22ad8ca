"""Records → rows → tables: pure, deterministically ordered, with every failure in the denominator."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from dlgbench.case import Case
from dlgbench.records import Manifest, Record, finite
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.text import printable

PER_TRIAL = ("image", "seed", "data")
"""The fields of a case in which the trials of one row differ."""
RECOVERED = ("recognisable", "exact")
WORST = {
    "psnr": -math.inf, "ssim": -math.inf, "mse": math.inf, "pearson_quarter": -math.inf,
    "psnr_affine": -math.inf,
}  # fmt: skip
"""The metrics of a row, and what a trial without a result has."""
Z95 = 1.959963984540054
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Row:
    """All trials that differ only in image and seed.

    Counts are of trials; a trial's outcome is that of its worst image, its metrics are its images'
    means.  Medians rank a trial without a result as the worst; None where the median is such a trial.
    """

    name: str
    dataset: str
    batch: int
    resolution: int
    attack: str = ""
    """Empty for a trivial baseline."""
    defense: str = ""
    steps: int = 0
    dtype: str = ""
    trials: int = 0
    planned: int = 0
    exact: int = 0
    recovered: int = 0
    interval: tuple[float, float] = (0.0, 1.0)
    partly: int = 0
    """Trials of the outcome *partial*, which are not recovered."""
    identified: int | None = None
    """Trials whose every image tells which of the dataset's it is of; None where that was not asked."""
    psnr: float | None = None
    ssim: float | None = None
    mse: float | None = None
    pearson_quarter: float | None = None
    psnr_affine: float | None = None
    label_accuracy: float | None = None
    convergence_step: float | None = None
    relative: float | None = None
    diverged: int = 0
    broken: int = 0
    mismatched: int = 0
    stalled: int = 0
    closures: float | None = None
    seconds: float | None = None
    reason: str = ""
    """Why all trials were skipped."""

    @property
    def trivial(self) -> bool:
        """Whether it is a baseline that nobody attacked for."""
        return not self.attack

    @property
    def partial(self) -> bool:
        """Whether planned trials are missing: such a row is in no leaderboard."""
        return self.trials < self.planned


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927), (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate, z2 = successes / trials, Z95**2 / trials
    centre = (rate + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (rate * (1 - rate) + z2 / 4)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def rows(records: Iterable[Record], planned: Mapping[Key, int] | None = None) -> list[Row]:
    """One row per configuration and one per trivial baseline, best first, baselines last.

    ``planned`` counts the trials each configuration should have; without it, all that are there.
    """
    groups: dict[Key, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.case.id):
        groups.setdefault(key(record.case), []).append(record)
    found = [_row(group, (planned or {}).get(k, len(group))) for k, group in groups.items()]
    return sorted(found, key=_rank) + _baselines(groups.values())


def table(manifest: Manifest, records: Mapping[str, Record]) -> list[Row]:
    """The rows of one plan as it was run; a configuration with missing trials is partial."""
    attacked = [case for case in manifest.cases if not case.trains]
    planned = Counter(key(case) for case in attacked)
    found = [records[case.id] for case in attacked if case.id in records]
    begun = {key(record.case) for record in found}
    absent = {key(case): case for case in attacked if key(case) not in begun}
    return rows(found, planned) + [Row(**_described(case), planned=planned[k]) for k, case in absent.items()]


def key(case: Case) -> Key:
    """What the trials of one row have in common: all but image and seed."""
    return tuple(str(item) for item in case.identity().items() if item[0] not in PER_TRIAL)


def _row(group: Sequence[Record], planned: int) -> Row:
    case, ran = group[0].case, [record for record in group if record.status != "skipped"]
    whole = [record for record in ran if not record.broken]
    recovered = sum(record.outcome in RECOVERED for record in whole)
    right = sum(_labels_found(record.images) for record in ran)
    medians: dict[str, Any] = {metric: _median(ran, metric, worst) for metric, worst in WORST.items()}
    steps = [record.convergence_step for record in ran if record.convergence_step is not None]
    return Row(
        **_described(case), trials=len(ran or group), planned=planned,
        recovered=recovered, interval=wilson(recovered, len(ran)),
        exact=sum(record.outcome == "exact" for record in whole),
        partly=sum(record.outcome == "partial" for record in whole), identified=_identified(whole),
        **medians,
        label_accuracy=right / (case.batch * len(ran)) if ran else None,
        convergence_step=median(steps) if steps else None,
        relative=finite(median([math.inf if r.relative is None else r.relative for r in ran] or [math.inf])),
        diverged=sum(record.status == "diverged" for record in ran),
        broken=sum(record.broken for record in ran),
        mismatched=sum("matched-but-wrong" in record.flags for record in ran),
        stalled=sum("stalled" in record.flags and record.outcome == "failed" for record in ran),
        closures=middle(record.closures for record in whole),
        seconds=middle(record.cost.get("seconds") for record in whole),
        reason="" if ran else printable(group[0].reason),
    )  # fmt: skip


def _identified(records: Sequence[Record]) -> int | None:
    nearest = [max((image.get("rank", 0) for image in record.images), default=0) for record in records]
    return nearest.count(1) if nearest and all(nearest) else None


def _baselines(groups: Iterable[Sequence[Record]]) -> list[Row]:
    """The trivial baselines of every distinct set of private images, over the distinct images."""
    found: dict[Key, dict[int, Record]] = {}
    for record in (record for group in groups for record in group):
        for name in record.baselines:
            images = (name, *input_of(record.case).values(), record.case.preparation, record.case.channels)
            found.setdefault(images, {})[record.case.image] = record
    return [_baseline(images[0], list(trials.values())) for images, trials in sorted(found.items())]


def _baseline(name: str, records: Sequence[Record]) -> Row:
    rows = [record.baselines[name] for record in records]
    values: dict[str, Any] = {
        metric: median(_mean(row, metric) for row in rows) for metric in WORST if metric in rows[0][0]
    }
    return Row(name=f"({name.replace('_', ' ')})", **input_of(records[0].case), **values)


def _described(case: Case) -> dict[str, Any]:
    """What was attacked, and how."""
    return {
        **input_of(case), "name": _name(case), "attack": _attack(case),
        "defense": printable(DEFENSES.brief(case.defense)), "steps": case.steps, "dtype": case.dtype,
    }  # fmt: skip


def input_of(case: Case) -> dict[str, Any]:
    """The fields of a `Row` that tell what the private images are."""
    dataset = printable(DATASETS.brief(case.dataset))
    return {"dataset": dataset, "batch": case.batch, "resolution": case.resolution}


def _attack(case: Case) -> str:
    starts = [f"starts={case.starts}"] if case.starts > 1 else []
    return printable(" ".join([ATTACKS.brief(case.attack), *starts]))


def _name(case: Case) -> str:
    """The network, and what of its input and output is not as it is registered."""
    entry = NETWORKS.entries.get(case.network.name)
    usual = {name: fact for name, fact in entry.facts.items() if fact is not None} if entry else {}
    told = [
        f"{name}={getattr(case, name)}"
        for name, standard in {"preparation": "", "channels": 3, "classes": 0, **usual}.items()
        if name in ("preparation", "channels", "classes") and getattr(case, name) != standard
    ]
    trained = [f"epochs={case.epochs}"] if case.epochs else []
    return printable(" ".join([NETWORKS.brief(case.network), *told, *trained]))


def _rank(row: Row) -> Key:
    """Skipped rows last; then by recovered share, exact share and PSNR, then by name."""
    share = max(row.trials, 1)
    psnr = -math.inf if row.psnr is None else row.psnr
    return (
        bool(row.reason),
        -row.recovered / share,
        -row.exact / share,
        -psnr,
        *map(str, asdict(row).values()),
    )


def _median(records: Sequence[Record], metric: str, worst: float) -> float | None:
    values = [
        _mean(record.images, metric) if record.images and metric in record.images[0] else worst
        for record in records
    ]
    return finite(median(values)) if values else None


def _labels_found(images: Sequence[Mapping[str, Any]]) -> int:
    """How many of a batch's labels were found, with their multiplicity: of whichever of its images."""
    truth, found = (Counter(image[kind] for image in images) for kind in ("label", "label_found"))
    return (truth & found).total()


def middle(values: Iterable[float | None]) -> float | None:
    """The median of what is known."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _mean(images: Sequence[Mapping[str, Any]], metric: str) -> float:
    return math.fsum(image[metric] for image in images) / len(images)
