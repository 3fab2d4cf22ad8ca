"""Plots of records and their pictures: the same files give the same bytes, in whatever order they come."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
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
from dlgbench.registry import KINDS, NETWORKS

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH, DPI, MARGIN, GAP = 1600, 150, 32, 6  # pixels, as are all sizes below
INK, MUTED, PALE = "#222222", "#737373", "#adadad"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
BLANK = np.full((1, 1, 1, 1, 3), 240, np.uint8)
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": PALE, "axes.spines.top": False, "axes.spines.right": False, "axes.xmargin": 0.02,
    "axes.grid": True, "grid.color": "#e8e8e8", "xtick.color": MUTED, "ytick.color": MUTED,
    "legend.frameon": False,
}  # fmt: skip
MOST_FRAMES, MOST_ROWS, MOST_TRIALS, MOST_GROUPS = 64, 8, 6, 300  # the last: Agg draws 65,536 pixels
TOLD_FIRST = (*KINDS, "batch", "epochs", "starts", "dtype")
"""Of what tells two groups apart: the rest often follows from it, and a long label is cut."""
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
        lost = [record.status for record in self.trials if record.outcome == "failed"]
        causes = [f" ({lost.count(cause)} {cause})" for cause in sorted({*lost} - {"done"})]
        return f"failed: {len(lost)} of {len(self.trials)}" + "".join(causes)


def draw(records: Sequence[Record], pictures: Path, folder: Path) -> list[Path]:
    """Write every plot into ``folder``; ``pictures/ID.npz`` holds the arrays of a trial that has any."""
    return write_all(figures(grouped(records), pictures), folder)


def write_all(named: Iterable[tuple[str, Figure]], folder: Path) -> list[Path]:
    """Write figures, which are drawn one by one, by their names."""
    paths = []
    # A user's matplotlibrc must not change a view; letters that the font lacks are drawn as boxes.
    with style.context([STYLE], after_reset=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name, figure in named:
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
        if record.status != "skipped" and not record.case.trains:
            found.setdefault(replace(record.case, image=0, seed=0, data=""), []).append(record)
    known = {name: i for i, name in enumerate(NETWORKS.entries)}
    cases = sorted(found, key=lambda case: (
        known.get(case.network.name, len(known)), *(KINDS[name].brief(getattr(case, name)) for name in KINDS),
        case.batch, case.resolution, case.steps, repr(case)))  # fmt: skip
    labels = [label(case, cases) for case in cases]
    clean = [re.sub("[^a-z0-9_.-]+", "-", text.lower())[:80] for text in labels]
    slugs = [slug if clean.count(slug) == 1 else f"{slug}-{zlib.crc32(ascii(text).encode()):08x}"
             for slug, text in zip(clean, labels, strict=True)]  # fmt: skip
    return [Group(labels[i], slugs[i], COLOURS[i % 7], ("-", "--", ":", "-.")[i // 7 % 4], tuple(found[case]))
            for i, case in enumerate(cases)]  # fmt: skip


def label(case: Case, cases: Sequence[Case]) -> str:
    """The network, and of all else what is not the rule and differs among the ``cases`` of that network."""
    words, peers = [NETWORKS.brief(case.network)], [peer for peer in cases if peer.network == case.network]
    usual = {field.name: field.default for field in fields(case)}
    for name in sorted(usual, key=lambda name: name not in TOLD_FIRST):
        value = getattr(case, name)
        if value != usual[name] and len({getattr(peer, name) for peer in peers}) > 1:
            words.append(f"{name}={KINDS[name].brief(value) if name in KINDS else value}")
    return ", ".join(words)


def curves(records: Sequence[Record]) -> Array:
    """MSE ``(trial, step)`` of the trials that have any; one that stopped early keeps its last value."""
    traces = [np.array(record.history.get("mse", []), dtype=float) for record in records]
    known, steps = [np.flatnonzero(np.isfinite(trace)) for trace in traces], np.arange(max(map(len, traces)))
    held = [trace[sound[np.searchsorted(sound[1:], steps, side="right")]]
            for trace, sound in zip(traces, known, strict=True) if len(sound)]  # fmt: skip
    return np.maximum(held, 1e-16)  # a logarithmic axis has no zero


def read(record: Record, pictures: Path) -> list[Array] | None:
    """Its private, reconstruction, evolution (in RGB) and steps; None where absent, damaged or misshapen."""
    frame = record.case.batch, record.case.resolution, record.case.resolution, record.case.channels
    names = [f"{name}.npy" for name in ("private", "reconstruction", "evolution", "steps")]
    try:
        with zipfile.ZipFile(pictures / f"{record.case.id}.npz") as file:
            if max(file.getinfo(name).file_size for name in names) > MOST_FRAMES * np.prod(frame) + 4096:
                return None
            parts = [io.BytesIO(file.read(name)) for name in names]
            *images, steps = [np.lib.format.read_array(part, allow_pickle=False) for part in parts]
    except DAMAGED:
        return None
    arrays, kinds = [*images, steps], ["|u1", "|u1", "|u1", "<i8"]
    shapes = [(1, *frame), (1, *frame), (steps.size, *frame), (steps.size,)]
    right = [array.shape for array in arrays] == shapes and [array.dtype.str for array in arrays] == kinds
    if not right or not 1 <= steps.size <= MOST_FRAMES:
        return None
    return [*(np.broadcast_to(array, (*array.shape[:-1], 3)) for array in images), steps]


def mse_plot(group: Group) -> Figure:
    """MSE against step: every trial that has a curve, their median and the grey image."""
    case, rows = group.trials[0].case, curves(group.trials)
    about = [f"{name} {plain(short(KINDS[name].brief(getattr(case, name)), 50))}" for name in [*KINDS][1:]]
    about += [f"{case.steps} steps", f"trials: {len(group.trials)}"]
    figure, _ = page_of(800, f"{group.label}: MSE against step", ", ".join(about))
    axes = _chart(figure, WIDTH - 180, rows)
    axes.plot(np.median(rows, axis=0), color=group.colour, lw=2.8, zorder=3, label=f"median of {len(rows)}")
    for lost, colour, text in ((True, PALE, group.tally), (False, group.colour, "partial or better")):
        axes.plot([], color=colour, lw=0.9, label=text)
        for record in group.trials:
            if lost == (record.outcome == "failed"):
                axes.plot(curves([record]).T, color=colour, lw=0.9, alpha=0.8)
    greys = [[image["mse"] for image in record.baselines.get("grey", [])] for record in group.trials]
    if means := [np.mean(grey) for grey in greys if grey]:
        axes.axhline(float(np.median(means)), color=MUTED, linestyle="--", label="mid grey image")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return figure


def mse_all(groups: Sequence[Group]) -> Figure:
    """The median MSE of every group against step, in a band from quartile to quartile."""
    about = "Median over all trials of a network, failed ones included, in a band from quartile to quartile"
    figure, _ = page_of(max(800, 260 + 70 * len(groups)), "All networks: MSE against step", about)
    quartiles = [np.percentile(curves(group.trials), [25, 50, 75], axis=0) for group in groups]
    axes, lengths = _chart(figure, 980, np.hstack(quartiles)), [rows.shape[1] for rows in quartiles]
    for i in sorted(range(len(groups)), key=lambda i: -quartiles[i][1, -1]):
        group, (low, middle, high) = groups[i], quartiles[i]
        end = f"{middle[-1]:.1e} after {lengths[i] - 1} steps (n = {len(curves(group.trials))})"
        axes.fill_between(np.arange(lengths[i]), low, high, color=group.colour, alpha=0.13, linewidth=0)
        axes.plot(middle, group.dashes, color=group.colour, lw=2.4, marker="o", markevery=[-1],
                  label=f"{plain(short(group.label, 32))}\n{end}")  # fmt: skip
    if max(lengths) > 4 * min(lengths):  # else the short ones would be a dot in the corner
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:.0f}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1), borderaxespad=0, labelspacing=1, handlelength=2.6)
    return figure


def evolution(group: Group, record: Record, arrays: Sequence[Array]) -> Figure:
    """The frames of one trial, its reconstruction and the private image; a row per image of the batch."""
    about = (
        f"The least relative gradient distance, {record.relative:.0e}, of {len(group.trials)} in all: "
        "chosen by objective, never by error to the private image.\nImage "
        f"{record.case.image}, seed {record.case.seed}; its reconstruction is chosen in the same way."
    )
    columns, rows = [*arrays[2], arrays[1][0], arrays[0][0]], min(record.case.batch, MOST_ROWS)
    heads = [*(f"step {step}" for step in arrays[3]), "reconstruction", "private"]
    side = min(360, (WIDTH - 2 * MARGIN - GAP) // len(columns) - GAP)
    figure, page = page_of(190 + rows * (side + GAP), f"{group.label}: from noise to reconstruction", about)
    for column, (images, head) in enumerate(zip(columns, heads, strict=True)):
        x = MARGIN + column * (side + GAP) + 2 * GAP * (column >= len(arrays[3]))
        page.text(x + side / 2, 164, head, ha="center", va="bottom", size=8)
        for y, image in zip(range(174, 174 + rows * (side + GAP), side + GAP), images, strict=False):
            page.imshow(image, extent=(x, x + side, y + side, y), aspect="auto")
    return figure


def gallery(groups: Sequence[Group], pictures: Path) -> Figure:
    """Private beside reconstruction: a row per group, its first trials in order of image and seed."""
    about = (f"Left the private image, right its reconstruction: the first {MOST_TRIALS} trials by image and "
             "seed, none picked,\nfailures included; of a batch the first image.")  # fmt: skip
    figure, page = page_of(140 + 190 * len(groups), "Private images and their reconstructions", about)
    for y, group in zip(range(150, 150 + 190 * len(groups), 190), groups, strict=True):
        words = re.sub("[:,](?! )", r"\g<0> ", short(group.label, 110))
        words = " ".join(word.replace("=", "= ") if len(word) > 20 else word for word in words.split())
        lines = [*map(plain, textwrap.wrap(words, 20))]
        page.text(MARGIN, y, "\n".join(lines), color=group.colour, va="top", weight="bold", size=8)
        below = y + max(106, 20 * len(lines) + 6)
        page.text(MARGIN, below, group.tally.replace(" (", "\n("), color=MUTED, va="top", size=8)
        for x, record in zip(range(270, WIDTH, 220), group.trials[:MOST_TRIALS], strict=False):
            for left, images in zip((x, x + 103), read(record, pictures) or [BLANK, BLANK], strict=False):
                page.imshow(images[0, 0], extent=(left, left + 100, y + 100, y), aspect="auto")
            score = f"{record.images[0]['psnr']:.1f} dB, " if record.images else ""
            verdict = f"{score}{record.outcome if record.status == 'done' else record.status}"
            page.text(x, y + 106, f"image {record.case.image}, seed {record.case.seed}\n{verdict}", va="top",
                      size=8, color=MUTED if record.outcome == "failed" else INK)  # fmt: skip
    return figure


def page_of(height: int, title: str, about: str) -> tuple[Figure, Axes]:
    """A figure, and axes over all of it, in pixels from its top left corner."""
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0), autoscale_on=False)
    page.set_axis_off()
    title = short(title, 130)
    page.text(MARGIN, 24, plain(title), va="top", size=13 * min(1, 90 / len(title)), weight="bold")
    page.text(MARGIN, 66, about, va="top", color=MUTED)
    return figure, page


def _chart(figure: Figure, width: int, values: Array) -> Axes:
    """Axes for ``values`` of MSE: whole steps, and whole decades up to 1, the greatest that there is."""
    height, lowest = figure.bbox.height, 10 ** min(-2, np.floor(np.log10(values.min())))
    axes = figure.add_axes((130 / WIDTH, 90 / height, width / WIDTH, 1 - 240 / height), xlabel="step",
                           ylabel="MSE of the images", yscale="log", ylim=(lowest, 1))  # fmt: skip
    axes.locator_params(axis="x", integer=True)
    return axes


def short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def plain(text: str) -> str:
    """Text of others, without mathtext and characters that cannot be drawn."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text).replace("$", r"\$")
