"""What is recovered against what accuracy is lost: a plot per network, every defence a number in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from math import dist, hypot

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dlgbench.plots import COLOURS, INK, MUTED, PALE, WIDTH, page_of, plain, short
from dlgbench.tradeoff import Rate, Tradeoff

HEIGHT, LEFT, RIGHT, ABOVE, BELOW = 1000, 130, 1050, 150, 110  # pixels: the chart's borders on the page
LINEAR = 1.0
"""Points of accuracy up to which the axis is linear."""
ROOM = 26
"""Pixels that one number takes."""


def figures(rows: Sequence[Tradeoff]) -> Iterator[tuple[str, Figure]]:
    """A plot per network and data, with the name of its file; of rows whose cost and leak are known."""
    known = [row for row in rows if row.lost is not None and row.strongest]

    def subject(row: Tradeoff) -> str:
        several = f", {row.batch} images in a gradient" if row.batch > 1 else ""
        return f"{row.name} on {row.dataset} at {row.resolution} px{several}"

    for name, group in groupby(sorted(known, key=subject), key=subject):
        yield f"pareto_{re.sub('[^a-z0-9_.-]+', '-', name.lower())[:80]}", pareto(name, list(group))


def pareto(name: str, rows: Sequence[Tradeoff]) -> Figure:
    """Every defence of one network, and a line through those that no other is better than in both."""
    rows = sorted(rows, key=lambda row: (*(-share for share in _leak(row)), _lost(row), row.defense))
    figure, page = page_of(
        max(HEIGHT, 220 + 30 * len(rows)), f"{name}: what leaks against what it costs",
        "Trials recovered by the strongest attack, with 95 % intervals (dotted: those that show in part\n"
        "as well), against points of accuracy lost; in bold the defences that none beats in both.",
    )  # fmt: skip
    height = figure.bbox.height
    box = (LEFT / WIDTH, BELOW / height, (RIGHT - LEFT) / WIDTH, 1 - (ABOVE + BELOW) / height)
    axes = figure.add_axes(box, xlabel="points of accuracy lost", ylabel="recovered by the strongest attack")
    axes.set_xscale("symlog", linthresh=LINEAR)
    axes.set(xlim=(min(-LINEAR, *map(_lost, rows)) * 1.2, 100), ylim=(-0.05, 1.05))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    best = undominated(rows)
    axes.step([_lost(row) for row in best], [_rate(row) for row in best], where="post", color=PALE, zorder=1)
    _numbers(axes, rows, best)
    for index, row in enumerate(rows):
        y, (weight, colour) = ABOVE + 30 * index, ("bold", INK) if row in best else ("normal", MUTED)
        page.text(RIGHT + 64, y, str(index + 1), ha="right", va="top", weight=weight, color=colour)
        told = f"{row.defense}  {_told(row.strongest)}, {_lost(row):+.1f}"
        page.text(RIGHT + 80, y, plain(short(told, 44)), va="top", size=9, weight=weight, color=colour)
    return figure


def undominated(rows: Sequence[Tradeoff]) -> list[Tradeoff]:
    """Those than which no other leaks less and costs no more, or costs less and leaks no more, by cost."""

    def better(one: Tradeoff, other: Tradeoff) -> bool:
        leaks, costs = (_leak(one), _leak(other)), (_lost(one), _lost(other))
        return leaks[0] <= leaks[1] and costs[0] <= costs[1] and (leaks[0], costs[0]) != (leaks[1], costs[1])

    found = [row for row in rows if not any(better(other, row) for other in rows)]
    return sorted(found, key=_lost)


def _numbers(axes: Axes, rows: Sequence[Tradeoff], best: Sequence[Tradeoff]) -> None:
    """A circle for each with its interval; where one would cover another it is moved aside."""
    taken: list[tuple[float, float]] = []
    for index, row in enumerate(rows):
        rate, colour = row.strongest, COLOURS[0] if row in best else MUTED
        assert rate is not None
        lost, found, shown = _lost(row), _rate(row), sum(_leak(row))
        axes.plot([lost, lost], rate.interval, color=colour, lw=1, alpha=0.35, zorder=2)
        axes.plot([lost, lost], [found, shown], color=colour, lw=1.5, ls=":", zorder=2)
        x, y = axes.transData.transform((lost, found))
        taken.append(_free(axes, x, y, taken))
        x, y = axes.transData.inverted().transform(taken[-1])
        axes.plot([lost, x], [found, y], color=colour, lw=1, alpha=0.35, zorder=2)
        circle = {"boxstyle": "circle,pad=0.25", "facecolor": colour, "edgecolor": "white"}
        axes.text(
            x, y, str(index + 1), color="white", size=8, ha="center", va="center", zorder=4, bbox=circle
        )


def _free(axes: Axes, x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The place within the chart nearest to this one, in pixels, where a circle covers no other."""
    steps = sorted(product(range(-15, 16), repeat=2), key=lambda step: (hypot(*step), step))
    places = ((x + ROOM * across, y + ROOM * up) for across, up in steps)
    return next(
        place for place in places
        if axes.bbox.contains(*place) and all(dist(place, other) >= ROOM for other in taken)
    )  # fmt: skip


def _rate(row: Tradeoff) -> float:
    assert row.strongest is not None
    return row.strongest.recovered / row.strongest.trials


def _leak(row: Tradeoff) -> tuple[float, float]:
    """The shares of trials recovered and, of the others, shown in part."""
    assert row.strongest is not None
    return _rate(row), row.strongest.partly / row.strongest.trials


def _lost(row: Tradeoff) -> float:
    assert row.lost is not None
    return 100 * row.lost


def _told(rate: Rate | None) -> str:
    if not rate:
        return "–"
    return f"{rate.recovered}/{rate.trials}" + (f" (+{rate.partly})" if rate.partly else "")
