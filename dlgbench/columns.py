"""The columns of tables: rows → texts, and which of them fit a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import filesize

from dlgbench.leaderboard import Row
from dlgbench.records import COMPARED
from dlgbench.tradeoff import Rate, Tradeoff


@dataclass(frozen=True)
class Column:
    """A column of every rendered table; those of higher ``rank`` go first where room is short."""

    title: str
    meaning: str
    rank: int
    show: Callable[[Any], str]
    """The text of one row."""
    is_text: bool = False
    width: int = 40
    """Characters at most on a terminal; longer texts wrap."""


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None else format(value, pattern)


def _rate(row: Row) -> str:
    if row.reason:
        return "skipped"
    return _share(row) if row.attack else "–"


def _share(rate: Row | Rate | None) -> str:
    if rate is None:
        return "–"
    low, high = rate.interval
    return f"{rate.recovered}/{rate.trials} [{100 * low:.0f}–{100 * high:.0f} %]"


def _points(row: Tradeoff) -> str:
    if row.lost is None:
        return "–"
    half = f" ± {100 * (row.lost_interval[1] - row.lost):.1f}" if row.lost_interval else ""
    return f"{100 * row.lost:.1f}{half}"


def _bytes(size: float | None) -> str:
    return "–" if size is None else filesize.decimal(round(size))


def _missing(row: Tradeoff) -> str:
    partial = [f"partial: {row.trials} of {row.planned}"] if row.partial else []
    broken = [f"{row.broken} broken"] if row.broken else []
    return ", ".join(partial + broken) or row.reason


def _trouble(row: Row) -> str:
    parts = {
        "diverged": row.diverged,
        "matched but wrong": row.mismatched,
        "stalled": row.stalled,
        "broken": row.broken,
    }
    told = [f"{count} {name}" for name, count in parts.items() if count]
    partial = [f"partial: {row.trials} of {row.planned}"] if row.partial else []
    return ", ".join(partial + told) or row.reason


IDENTIFIED = (
    "trials whose every image is nearer to the private one than to all others of the dataset's "
    f"first {COMPARED}"
)
COLUMNS = (
    Column("network", "with every option that is not its default; in brackets, the trivial baselines", 0,
           lambda row: row.name, True),
    Column("attack", "with every option that is not its default", 0, lambda row: row.attack, True),
    Column("defense", "what the client does to its gradient", 0, lambda row: row.defense, True),
    Column("data", "the dataset of the private images", 0, lambda row: row.dataset, True),
    Column("px", "resolution of the private images", 0, lambda row: str(row.resolution)),
    Column("B", "images per gradient", 0, lambda row: str(row.batch)),
    Column("steps", "of the attack's optimiser; fewer than 300 are a taste, not the study's protocol", 2,
           lambda row: f"{row.steps}" if row.attack else "–"),
    Column("recovered", "trials whose every image is recognisable or better, 95 % Wilson interval", 0, _rate),
    Column("exact", "trials whose every image has PSNR ≥ 40 dB", 2,
           lambda row: str(row.exact) if row.attack else "–"),
    Column("partial", "other trials whose every image beats the best trivial baseline by 1 dB", 2,
           lambda row: str(row.partly) if row.attack else "–"),
    Column("identified", IDENTIFIED, 2, lambda row: _number(row.identified, "d")),
    Column("PSNR", "dB, median over all trials, those without a result the worst", 0,
           lambda row: _number(row.psnr, ".1f")),
    Column("SSIM", "the same median", 3, lambda row: _number(row.ssim, ".3f")),
    Column("corr¼", "correlation with the private image at a quarter of the resolution, median", 2,
           lambda row: _number(row.pearson_quarter, ".2f")),
    Column("PSNR ax+b", "dB after the best affine map of pixel values, median", 5,
           lambda row: _number(row.psnr_affine, ".1f")),
    Column("labels", "share of the private labels that were found, of whichever image of the batch", 0,
           lambda row: _number(row.label_accuracy, ".0%")),
    Column("conv.", "median step from which the MSE stays within twice its last value, if not failed", 4,
           lambda row: _number(row.convergence_step, ".0f")),
    Column("|Δg|²/|g|²", "relative squared gradient distance, median", 5,
           lambda row: _number(row.relative, ".0e")),
    Column("closures", "evaluations of the objective, median", 6,
           lambda row: _number(row.closures, ".0f")),
    Column("s", "seconds a trial, median", 6, lambda row: _number(row.seconds, ".0f")),
    Column("dtype", "of images, weights and gradients", 0, lambda row: row.dtype, True),
    Column("failures", "what went wrong; all of it counts in the denominators", 1, _trouble, True, 18),
)  # fmt: skip
TRADEOFFS = (
    Column("network", "with every option that is not its default", 0, lambda row: row.name, True),
    Column("defense", "what the client does before it shares", 0, lambda row: row.defense, True),
    Column("data", "what is attacked and what is trained on", 0, lambda row: row.dataset, True),
    Column("px", "resolution of the images", 0, lambda row: str(row.resolution)),
    Column("B", "images per gradient that is attacked", 0, lambda row: str(row.batch)),
    Column("ε", "privacy loss of the training, where the defence has one", 1,
           lambda row: _number(row.epsilon, ".3g")),
    Column("δ", "probability that the privacy loss is larger", 5, lambda row: _number(row.delta, ".0e")),
    Column("naive", "trials whose every image was recovered by an attack that does not know the defence, "
           "95 % Wilson interval", 0, lambda row: _share(row.naive)),
    Column("adaptive", "the same of an attack that knows the defence and its parameters", 0,
           lambda row: _share(row.adaptive)),
    Column("partial", "other trials of the stronger that beat the best trivial baseline by 1 dB", 2,
           lambda row: str(row.strongest.partly) if row.strongest else "–"),
    Column("identified", f"{IDENTIFIED}; of the stronger", 2,
           lambda row: _number(row.strongest.identified if row.strongest else None, "d")),
    Column("PSNR", "dB, of the stronger, median over all trials", 3, lambda row: _number(row.psnr, ".1f")),
    Column("corr¼", "correlation with the private image at a quarter of the resolution, median", 3,
           lambda row: _number(row.pearson_quarter, ".2f")),
    Column("labels", "share of the private labels that it found", 3,
           lambda row: _number(row.label_accuracy, ".0%")),
    Column("accuracy", "on images kept back, after training with the defence at every update, mean", 2,
           lambda row: _number(row.accuracy, ".1%")),
    Column("lost", "points of accuracy less than without defence, 95 % interval of Student's t", 0, _points),
    Column("sent", "by a client in one update", 4, lambda row: _bytes(row.update_bytes)),
    Column("ms", "milliseconds an update, median", 4,
           lambda row: "–" if row.update_seconds is None else f"{1000 * row.update_seconds:.1f}"),
    Column("slower", "times the milliseconds of an update without a defence", 4,
           lambda row: _number(row.slower, ".1f")),
    Column("missing", "what could not be measured, and why", 1, _missing, True, 18),
)  # fmt: skip
_HOISTED = ("attack", "defense", "data", "px", "B", "dtype")


def of(rows: Sequence[Row | Tradeoff]) -> Sequence[Column]:
    """The columns of a leaderboard's rows, or of trade-offs."""
    return TRADEOFFS if rows and isinstance(rows[0], Tradeoff) else COLUMNS


@dataclass(frozen=True)
class Grid:
    """A table as texts; what all its attacks have in common stands in ``shared`` instead of a column."""

    columns: list[Column]
    lines: list[list[str]]
    shared: dict[str, str]


def grid(found: Sequence[Row | Tradeoff]) -> Grid:
    """The texts of ``found``, without the columns in which nothing stands or which all rows share."""
    columns = of(found)
    texts = [[column.show(row) for column in columns] for row in found]
    values = [{line[i] for line in texts} - {"", "–"} for i in range(len(columns))]
    hoisted = [column.title in _HOISTED and len(values[i]) == 1 for i, column in enumerate(columns)]
    keep = [i for i in range(len(columns)) if values[i] and not hoisted[i]]
    shared = {columns[i].title: next(iter(values[i])) for i in range(len(columns)) if hoisted[i]}
    return Grid([columns[i] for i in keep], [[line[i] for i in keep] for line in texts], shared)


def fitting(whole: Grid, width: int) -> Grid:
    """``whole`` less its least important columns, until its lines have at most ``width`` characters."""
    keep = list(range(len(whole.columns)))

    def needed() -> int:
        return sum(min(max(map(len, texts(i))), whole.columns[i].width) + 3 for i in keep)

    def texts(i: int) -> list[str]:
        return [whole.columns[i].title, *(line[i] for line in whole.lines)]

    while needed() > width and max(whole.columns[i].rank for i in keep) > 0:
        keep.remove(max(keep, key=lambda i: whole.columns[i].rank))
    return Grid(
        [whole.columns[i] for i in keep], [[line[i] for i in keep] for line in whole.lines], whole.shared
    )
