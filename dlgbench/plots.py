"""Plots of records and their pictures: the same files give the same bytes, in whatever order they come."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dlgbench.case import Case
from dlgbench.records import Record, write
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS, ROOMS

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH, DPI, MARGIN, GAP = 1600, 150, 32, 6  # pixels, as are all sizes below
INK, MUTED, PALE = "#222222", "#737373", "#adadad"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": PALE, "axes.spines.top": False, "axes.spines.right": False, "axes.xmargin": 0.02,
    "axes.grid": True, "grid.color": "#e8e8e8", "xtick.color": MUTED, "ytick.color": MUTED,
    "legend.frameon": False,
}  # fmt: skip
MOST_FRAMES, MOST_ROWS, MOST_TRIALS, MOST_GROUPS = 64, 8, 6, 300  # the last: Agg draws 65,536 pixels
DAMAGED = (OSError, EOFError, LookupError, ValueError, TypeError, MemoryError, RuntimeError, TokenError,
           zipfile.BadZipFile, zlib.error)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The trials that differ in image and seed alone, in that order, and how plots show them."""

    label: str
    slug: str
    colour: str
    dashes: str
    trials: tuple[Record, ...]

    @property
    def tally(self) -> str:
        """Such as ``failed: 4 of 10 (1 diverged)``."""
        lost = [record for record in self.trials if record.outcome == "failed"]
        causes = sorted(Counter(record.status for record in lost if record.status != "done").items())
        detail = ", ".join(f"{number} {status}" for status, number in causes)
        return f"failed: {len(lost)} of {len(self.trials)}" + (f" ({detail})" if detail else "")


def draw(records: Sequence[Record], pictures: Path, folder: Path) -> list[Path]:
    """Write every plot into ``folder``; ``pictures/ID.npz`` holds the arrays of a trial that has any."""
    paths = []
    # A user's matplotlibrc must not change a view; letters that the font lacks are drawn as boxes.
    with style.context([STYLE], after_reset=True), warnings.catch_warnings(action="ignore", category=UserWarning):
        for name, figure in figures(grouped(records), pictures):
            figure.savefig(file := io.BytesIO(), format="png", metadata={"Software": None})
            paths.append(folder / f"{name}.png")
            write(paths[-1], file.getvalue())
    return paths


def figures(groups: Sequence[Group], pictures: Path) -> Iterator[tuple[str, Figure]]:
    """Every plot with the name of its file."""
    drawable = [group for group in groups if len(curves(group.trials))]
    yield from ((f"mse_{group.slug}", mse_plot(group)) for group in drawable)
    if drawable:
        yield "mse_all", mse_all(drawable)
    for group in groups:
        known = [record for record in group.trials if record.relative is not None]
        ranked = sorted(known, key=lambda record: record.relative or 0.0)  # what the attacker can tell
        if shown := next(((record, arrays) for record in ranked if (arrays := read(record, pictures))), None):
            yield f"evolution_{group.slug}", evolution(group, *shown)
    if groups:
        yield "gallery", gallery(groups[:MOST_GROUPS], pictures)


def grouped(records: Sequence[Record]) -> list[Group]:
    """The trials (skipped cases are none) by everything but image and seed, networks as registered."""
    found: dict[Case, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.case.image, record.case.seed)):
        if record.status != "skipped":
            found.setdefault(replace(record.case, image=0, seed=0), []).append(record)
    known = {name: i for i, name in enumerate(NETWORKS.entries)}
    cases = sorted(found, key=lambda case: (
        known.get(case.network.name, len(known)), *(ROOMS[name].brief(getattr(case, name)) for name in ROOMS),
        case.batch, case.resolution, case.steps, repr(case)))  # fmt: skip
    labels = [label(case, cases) for case in cases]
    clean = [re.sub("[^a-z0-9_.-]+", "-", text.lower())[:80] for text in labels]
    slugs = [slug if clean.count(slug) == 1 else f"{slug}-{zlib.crc32(ascii(text).encode()):08x}"
             for slug, text in zip(clean, labels, strict=True)]  # fmt: skip
    return [Group(labels[i], slugs[i], COLOURS[i % 7], DASHES[i // 7 % 4], tuple(found[case]))
            for i, case in enumerate(cases)]  # fmt: skip


def label(case: Case, cases: Sequence[Case]) -> str:
    """The network, and of all else what differs among the ``cases`` of that network."""
    words, peers = [NETWORKS.brief(case.network)], [peer for peer in cases if peer.network == case.network]
    for name in (field.name for field in fields(case)):
        if len({getattr(peer, name) for peer in peers}) > 1:
            value = getattr(case, name)
            words.append(f"{name}={ROOMS[name].brief(value) if name in ROOMS else value}")
    return ", ".join(words)


def curves(records: Sequence[Record]) -> Array:
    """MSE ``(trial, step)`` of the trials that have any; one that stopped early keeps its last value."""
    traces = [np.array(record.history.get("mse", []), dtype=float) for record in records]
    known = [np.flatnonzero(np.isfinite(trace)) for trace in traces]
    steps = np.arange(max(map(len, traces), default=0))
    held = [trace[sound[np.searchsorted(sound[1:], steps, side="right")]]
            for trace, sound in zip(traces, known, strict=True) if len(sound)]  # fmt: skip
    return np.maximum(held, 1e-16)  # a logarithmic axis has no zero


def read(record: Record, pictures: Path) -> list[Array] | None:
    """Its private, reconstruction, evolution and steps; None where absent, damaged or of another shape."""
    frame = record.case.batch, record.case.resolution, record.case.resolution, record.case.channels
    names = [f"{name}.npy" for name in ("private", "reconstruction", "evolution", "steps")]
    try:
        with zipfile.ZipFile(pictures / f"{record.case.id}.npz") as file:
            if max(file.getinfo(name).file_size for name in names) > MOST_FRAMES * np.prod(frame) + 4096:
                return None
            parts = [io.BytesIO(file.read(name)) for name in names]
            arrays = [np.lib.format.read_array(part, allow_pickle=False) for part in parts]
    except DAMAGED:
        return None
    count, kinds = arrays[3].size, [array.dtype.str for array in arrays]
    fits = [array.shape for array in arrays] == [(1, *frame), (1, *frame), (count, *frame), (count,)]
    return arrays if fits and kinds == ["|u1", "|u1", "|u1", "<i8"] and 1 <= count <= MOST_FRAMES else None


def mse_plot(group: Group) -> Figure:
    """MSE against step: every trial that has a curve, their median and the grey image."""
    case, rows, count = group.trials[0].case, curves(group.trials), len(group.trials)
    about = (f"attack {ATTACKS.brief(case.attack)}, defense {DEFENSES.brief(case.defense)}, "
             f"data {DATASETS.brief(case.dataset)}, {case.steps} steps, trials: {count}")  # fmt: skip
    figure = _figure(800, f"{group.label}: MSE against step", _plain(about, 140))
    axes = _chart(figure, WIDTH - 180, rows)
    axes.plot(np.median(rows, axis=0), color=group.colour, lw=2.8, zorder=3, label=f"median (n = {len(rows)})")
    lost = [record for record in group.trials if record.outcome == "failed"]
    kept = [record for record in group.trials if record.outcome != "failed"]
    text = f"partial or better: {len(kept)} of {count}"
    for trials, colour, text in ((lost, PALE, group.tally), (kept, group.colour, text)):
        axes.plot([], color=colour, lw=0.9, label=text)
        for record in trials:
            axes.plot(curves([record]).T, color=colour, lw=0.9, alpha=0.8)
    greys = [[image["mse"] for image in record.baselines.get("grey", [])] for record in group.trials]
    if means := [np.mean(grey) for grey in greys if grey]:
        axes.axhline(float(np.median(means)), color=MUTED, linestyle="--", label="mid grey image")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return figure


def mse_all(groups: Sequence[Group]) -> Figure:
    """The median MSE of every group against step, in a band from quartile to quartile."""
    about = "Median over all trials of a network, failed ones included, in a band from quartile to quartile"
    figure = _figure(max(800, 260 + 70 * len(groups)), "All networks: MSE against step", about)
    quartiles = [np.percentile(curves(group.trials), [25, 50, 75], axis=0) for group in groups]
    axes, lengths = _chart(figure, 980, np.hstack(quartiles)), [rows.shape[1] for rows in quartiles]
    for i in sorted(range(len(groups)), key=lambda i: -quartiles[i][1, -1]):
        group, (low, middle, high) = groups[i], quartiles[i]
        text = f"{middle[-1]:.1e} after {lengths[i] - 1} steps (n = {len(group.trials)})"
        axes.fill_between(np.arange(lengths[i]), low, high, color=group.colour, alpha=0.13, linewidth=0)
        axes.plot(middle, group.dashes, color=group.colour, lw=2.4, marker="o", markevery=[-1],
                  label=f"{_plain(group.label, 32)}\n{text}")  # fmt: skip
    if max(lengths) > 4 * min(lengths):  # else the short ones would be a dot in the corner
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:.0f}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1), borderaxespad=0, labelspacing=1)
    return figure


def evolution(group: Group, record: Record, arrays: Sequence[Array]) -> Figure:
    """The frames of one trial, its reconstruction and the private image; a row per image of the batch."""
    about = (f"Chosen by objective, never by likeness to the private image: the least relative gradient distance "
             f"({record.relative:.0e}) of the trials (n = {len(group.trials)}).\n{_verdict(record)}. "
             "The reconstruction is the iterate of least distance.")
    columns, rows = [*arrays[2], arrays[1][0], arrays[0][0]], min(record.case.batch, MOST_ROWS)
    heads = [*(f"step {step}" for step in arrays[3]), "reconstruction", "private"]
    side = min(240, (WIDTH - 2 * MARGIN - GAP) // len(columns) - GAP)
    figure = _figure(190 + rows * (side + GAP), f"{group.label}: from noise to reconstruction", about)
    page = _page(figure)
    for column, (images, head) in enumerate(zip(columns, heads, strict=True)):
        x = MARGIN + column * (side + GAP) + 2 * GAP * (column >= len(arrays[3]))
        page.text(x + side / 2, 164, head, ha="center", va="bottom", fontsize=8)
        for row in range(rows):
            _image(page, images[row], x, 174 + row * (side + GAP), side)
    return figure


def gallery(groups: Sequence[Group], pictures: Path) -> Figure:
    """Private beside reconstruction: a row per group, its first trials in order of image and seed."""
    about = (f"Left the private image, right its reconstruction: the first {MOST_TRIALS} trials in order of image "
             "and seed, none picked,\nfailures included; the first image of a batch.")
    page = _page(figure := _figure(140 + 190 * len(groups), "Private images and their reconstructions", about))
    for y, group in zip(range(150, 150 + 190 * len(groups), 190), groups, strict=True):
        name = textwrap.fill(re.sub("[:,](?! )", r"\g<0> ", _plain(group.label, 50)), 19)
        page.text(MARGIN, y, name, color=group.colour, va="top", weight="bold", fontsize=9)
        tally = re.sub(r" (?=\()|(?<=,) ", "\n", group.tally)
        page.text(MARGIN, y + 106, tally, color=MUTED, va="top", fontsize=8)
        for x, record in zip(range(270, WIDTH, 220), group.trials[:MOST_TRIALS], strict=False):
            pair = read(record, pictures) or [np.full((1, 1, 1, 1, 1), 240, np.uint8)] * 2
            _image(page, pair[0][0, 0], x, y, 100)
            _image(page, pair[1][0, 0], x + 103, y, 100)
            colour = MUTED if record.outcome == "failed" else INK
            page.text(x, y + 106, _verdict(record).replace(": ", "\n"), va="top", fontsize=8, color=colour)
    return figure


def _verdict(record: Record) -> str:
    score = f"{record.images[0]['psnr']:.1f} dB, " if record.images else ""
    verdict = record.outcome if record.status == "done" else record.status
    return f"image {record.case.image}, seed {record.case.seed}: {score}{verdict}"


def _figure(height: int, title: str, about: str) -> Figure:
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI)
    figure.text(MARGIN / WIDTH, 1 - 24 / height, _plain(title, 90), va="top", size=13, weight="bold")
    figure.text(MARGIN / WIDTH, 1 - 66 / height, about, va="top", color=MUTED)
    return figure


def _chart(figure: Figure, width: int, values: Array) -> Axes:
    """Axes for ``values`` of MSE: whole steps, and whole decades up to 1, the greatest that there is."""
    height, lowest = figure.bbox.height, 10 ** min(-2, np.floor(np.log10(values.min())))
    axes = figure.add_axes((130 / WIDTH, 90 / height, width / WIDTH, 1 - 240 / height), xlabel="step",
                           ylabel="MSE of the images", yscale="log", ylim=(lowest, 1))  # fmt: skip
    axes.locator_params(axis="x", integer=True)
    return axes


def _page(figure: Figure) -> Axes:
    """Axes over the whole figure, in pixels from its top left corner."""
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(figure.bbox.height, 0), autoscale_on=False)
    page.set_axis_off()
    return page


def _image(page: Axes, pixels: Array, x: int, y: int, side: int) -> None:
    colours = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    page.imshow(colours, extent=(x, x + side, y + side, y), aspect="auto")


def _plain(text: str, most: int) -> str:
    """Text of others, shortened in its middle, without mathtext or characters that cannot be drawn."""
    short = text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in short).replace("$", r"\$")
