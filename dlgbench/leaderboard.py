"""Records → rows → tables: pure, deterministically ordered, with every failure in the denominator."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from dlgbench.case import Case
from dlgbench.records import Manifest, Record
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS

RECOVERED = ("recognisable", "exact")
Z95 = 1.959963984540054
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Row:
    """All trials that differ only in image and seed.

    Counts are of trials; a trial's outcome is that of its worst image, its metrics are its images'
    means.  Medians rank a trial without a result as the worst; None where the median is such a trial.
    """

    name: str
    attack: str
    defense: str
    dataset: str
    batch: int
    resolution: int
    steps: int
    dtype: str
    trials: int
    planned: int
    exact: int
    recovered: int
    interval: tuple[float, float]
    psnr: float | None
    ssim: float | None
    mse: float | None
    label_accuracy: float | None
    convergence_step: float | None
    relative: float | None
    diverged: int
    broken: int
    mismatched: int
    closures: float
    seconds: float
    reason: str = ""

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
    planned = Counter(key(case) for case in manifest.cases)
    return rows([records[i] for i in manifest.ids if i in records], planned)


def key(case: Case) -> Key:
    """What the trials of one row have in common: all but image and seed."""
    return tuple(str(getattr(case, item.name)) for item in fields(case) if item.name not in ("image", "seed"))


def _row(group: Sequence[Record], planned: int) -> Row:
    case, ran = group[0].case, [record for record in group if record.status != "skipped"]
    recovered = sum(record.outcome in RECOVERED for record in ran)
    labels = [image["label"] == image["label_found"] for record in ran for image in record.images]
    steps = [record.convergence_step for record in ran if record.convergence_step is not None]
    return Row(
        name=NETWORKS.brief(case.network), attack=ATTACKS.brief(case.attack), defense=DEFENSES.brief(case.defense),
        dataset=DATASETS.brief(case.dataset), batch=case.batch, resolution=case.resolution, steps=case.steps,
        dtype=case.dtype, trials=len(group), planned=planned,
        exact=sum(record.outcome == "exact" for record in ran), recovered=recovered,
        interval=wilson(recovered, len(ran)),
        psnr=_median(ran, "psnr", -math.inf), ssim=_median(ran, "ssim", -math.inf),
        mse=_median(ran, "mse", math.inf), label_accuracy=sum(labels) / len(labels) if labels else None,
        convergence_step=median(steps) if steps else None,
        relative=_finite(median([math.inf if r.relative is None else r.relative for r in ran] or [math.inf])),
        diverged=sum(record.status == "diverged" for record in ran),
        broken=sum(record.broken for record in ran),
        mismatched=sum("matched-but-wrong" in record.flags for record in ran),
        closures=median([record.closures for record in ran] or [0]),
        seconds=median([record.cost.get("seconds", 0.0) for record in ran] or [0.0]),
        reason="" if ran else group[0].reason,
    )  # fmt: skip


def _baselines(groups: Iterable[Sequence[Record]]) -> list[Row]:
    """The trivial baselines of every distinct set of private images, over the distinct images."""
    found: dict[Key, dict[int, Record]] = {}
    for group in groups:
        for record in group:
            for name in record.baselines:
                case = record.case
                images = (name, DATASETS.brief(case.dataset), case.batch, case.resolution, case.preparation, case.channels)
                found.setdefault(images, {})[case.image] = record
    return [_baseline(images[0], list(trials.values())) for images, trials in sorted(found.items())]


def _baseline(name: str, records: Sequence[Record]) -> Row:
    case = records[0].case
    values = {metric: median([_mean(record.baselines[name], metric) for record in records])
              for metric in ("psnr", "ssim", "mse") if metric in records[0].baselines[name][0]}
    return Row(
        name=f"baseline: {name.replace('_', ' ')}", attack="", defense="", dataset=DATASETS.brief(case.dataset),
        batch=case.batch, resolution=case.resolution, steps=0, dtype="", trials=len(records),
        planned=len(records), exact=0, recovered=0, interval=(0.0, 0.0), psnr=values.get("psnr"),
        ssim=values.get("ssim"), mse=values.get("mse"), label_accuracy=None, convergence_step=None,
        relative=None, diverged=0, broken=0, mismatched=0, closures=0, seconds=0.0,
    )  # fmt: skip


def _rank(row: Row) -> Key:
    """Skipped rows last; then by recovered share, exact share and PSNR, then by name."""
    share = max(row.trials, 1)
    psnr = -math.inf if row.psnr is None else row.psnr
    return (bool(row.reason), -row.recovered / share, -row.exact / share, -psnr, *map(str, asdict(row).values()))


def _median(records: Sequence[Record], metric: str, worst: float) -> float | None:
    values = [_mean(record.images, metric) if record.images and metric in record.images[0] else worst
              for record in records]
    return _finite(median(values)) if values else None


def _mean(images: Sequence[Mapping[str, Any]], metric: str) -> float:
    return math.fsum(image[metric] for image in images) / len(images)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Column:
    """A column of every rendered table; those of higher ``rank`` go first where room is short."""

    title: str
    meaning: str
    rank: int
    show: Callable[[Row], str]
    is_text: bool = False


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None else format(value, pattern)


def _rate(row: Row) -> str:
    if row.reason:
        return "skipped"
    if not row.attack:
        return "–"
    low, high = row.interval
    return f"{row.recovered}/{row.trials} [{100 * low:.0f}–{100 * high:.0f} %]"


def _trouble(row: Row) -> str:
    parts = {"diverged": row.diverged, "matched but wrong": row.mismatched, "broken": row.broken}
    told = [f"{count} {name}" for name, count in parts.items() if count]
    partial = [f"partial: {row.trials} of {row.planned}"] if row.partial else []
    return ", ".join(partial + told) or row.reason


COLUMNS = (
    Column("network", "with every option that is not its default", 0, lambda row: row.name, True),
    Column("attack", "with every option that is not its default", 0, lambda row: row.attack, True),
    Column("defense", "what the client does to its gradient", 0, lambda row: row.defense, True),
    Column("data", "the dataset of the private images", 0, lambda row: row.dataset, True),
    Column("px", "resolution of the private images", 1, lambda row: str(row.resolution)),
    Column("B", "images per gradient", 2, lambda row: str(row.batch)),
    Column("steps", "of the attack's optimiser; fewer than 300 are a taste, not the study's protocol", 1,
           lambda row: f"{row.steps}" if row.attack else "–"),
    Column("recovered", "trials whose every image is recognisable or better, 95 % Wilson interval", 0, _rate),
    Column("exact", "trials whose every image has PSNR ≥ 40 dB", 2,
           lambda row: str(row.exact) if row.attack else "–"),
    Column("PSNR", "dB, median over all trials, failures the worst", 0, lambda row: _number(row.psnr, ".1f")),
    Column("SSIM", "median over all trials, failures the worst", 3, lambda row: _number(row.ssim, ".3f")),
    Column("labels", "share of images whose label is right", 4, lambda row: _number(row.label_accuracy, ".0%")),
    Column("conv.", "median step from which the MSE stays within twice its last value, of trials not failed", 4,
           lambda row: _number(row.convergence_step, ".0f")),
    Column("|Δg|²/|g|²", "relative squared gradient distance, median", 5, lambda row: _number(row.relative, ".0e")),
    Column("closures", "evaluations of the objective, median", 6, lambda row: _number(row.closures or None, ".0f")),
    Column("s", "seconds a trial, median", 6, lambda row: _number(row.seconds or None, ".0f")),
    Column("failures", "what went wrong; all of it counts in the denominators", 3, _trouble, True),
)  # fmt: skip
_HOISTED = ("attack", "defense", "data")


@dataclass(frozen=True)
class Grid:
    """A table as texts; what all its attacks have in common stands in ``shared`` instead of a column."""

    columns: list[Column]
    lines: list[list[str]]
    shared: dict[str, str]


def grid(found: Sequence[Row]) -> Grid:
    """The texts of ``found``, without the columns in which nothing stands or which all rows share."""
    texts = [[column.show(row) for column in COLUMNS] for row in found]
    values = [{line[i] for line in texts} - {"", "–"} for i in range(len(COLUMNS))]
    hoisted = [column.title in _HOISTED and len(values[i]) == 1 for i, column in enumerate(COLUMNS)]
    keep = [i for i in range(len(COLUMNS)) if values[i] and not hoisted[i]]
    shared = {COLUMNS[i].title: next(iter(values[i])) for i in range(len(COLUMNS)) if hoisted[i]}
    return Grid([COLUMNS[i] for i in keep], [[line[i] for i in keep] for line in texts], shared)


def fitting(whole: Grid, width: int) -> Grid:
    """``whole`` less its least important columns, until its lines have at most ``width`` characters."""
    keep = list(range(len(whole.columns)))

    def needed() -> int:
        return sum(max(len(text) for text in [whole.columns[i].title, *(line[i] for line in whole.lines)]) + 3
                   for i in keep)

    while needed() > width and max(whole.columns[i].rank for i in keep) > 0:
        keep.remove(max(keep, key=lambda i: whole.columns[i].rank))
    return Grid([whole.columns[i] for i in keep], [[line[i] for i in keep] for line in whole.lines], whole.shared)
