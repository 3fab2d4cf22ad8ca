"""The progress of a run: one live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dlgbench.case import Case
from dlgbench.records import Record
from dlgbench.registry import ATTACKS, DEFENSES, NETWORKS
from dlgbench.text import printable

COLOURS = {"exact": "green", "recognisable": "green", "partial": "yellow", "failed": "red"}


def label(case: Case) -> str:
    """A case in a few words."""
    return printable(
        f"{NETWORKS.brief(case.network)} {ATTACKS.brief(case.attack)} {_defense(case)}"
        f"{case.dataset.name}[{case.image}] seed {case.seed}"
    )


def _defense(case: Case) -> str:
    return "" if case.defense.name == "none" else f"{DEFENSES.brief(case.defense)} "


def verdict(record: Record) -> Text:
    """How a trial ended, in a line."""
    style = COLOURS[record.outcome] if record.images else "yellow" if record.status == "skipped" else "red"
    if record.utility and record.status == "done":
        return Text(
            f"accuracy {record.utility['accuracy']:.1%}, {record.cost['seconds']:.0f} s", style="green"
        )
    text = Text(record.outcome if record.status == "done" else record.status, style=style)
    if record.images:
        psnr = sum(image["psnr"] for image in record.images) / len(record.images)
        text.append(
            f"  {psnr:.1f} dB in {record.closures} closures, {record.cost['seconds']:.0f} s", style="default"
        )
    if record.reason:
        text.append(f"  {printable(record.reason)}", style="default")
    return text


class Lines:
    """A line per trial, for logs and pipes."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.count = 0

    def live(self) -> AbstractContextManager[Any]:
        """What to hold open while trials run."""
        return nullcontext()

    def begin(self, cases: Sequence[Case]) -> None:
        """A batch of trials starts."""

    def step(self, step: int, objective: float, psnr: float) -> None:
        """It has come to this step; the numbers are medians over its trials."""

    def end(self, records: Sequence[Record]) -> None:
        for record in records:
            self.count += 1
            line = Text.assemble(f"[{self.count}/{self.total}] {label(record.case)}: ", verdict(record))
            self.console.print(line, soft_wrap=True, highlight=False)


class Bars(Lines):
    """A bar for the grid and one for the running batch, above them a line per finished trial."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, total)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False), TimeRemainingColumn(), console=console,
            speed_estimate_period=1800,  # seconds: a step of a deep network takes most of a minute
        )  # fmt: skip
        self.grid = self.progress.add_task("all trials", total=total, note="")
        self.batch = self.progress.add_task("", visible=False, note="")

    def live(self) -> AbstractContextManager[Any]:
        return self.progress

    def begin(self, cases: Sequence[Case]) -> None:
        name = label(cases[0]) + (f" and {len(cases) - 1} more" if len(cases) > 1 else "")
        self.progress.reset(self.batch, total=cases[0].steps, description=name, visible=True, note="")

    def step(self, step: int, objective: float, psnr: float) -> None:
        shown = "–" if math.isnan(psnr) else f"{psnr:.1f} dB"
        self.progress.update(self.batch, completed=step, note=f"objective {objective:.1e}  {shown}")

    def end(self, records: Sequence[Record]) -> None:
        self.progress.update(self.batch, visible=False)
        self.progress.advance(self.grid, len(records))
        super().end(records)


def display(console: Console, total: int) -> Lines:
    """Bars on a terminal, lines elsewhere."""
    return Bars(console, total) if console.is_terminal else Lines(console, total)
