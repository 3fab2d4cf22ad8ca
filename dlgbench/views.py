"""Tables of what is stored, on a console or standard output."""

from __future__ import annotations

import sys

from rich.console import Console

from dlgbench import leaderboard, render
from dlgbench.records import Manifest
from dlgbench.store import Store


def print_table(console: Console, store: Store, manifest: Manifest, form: str) -> None:
    """One plan's table, and the damaged records that are missing from it."""
    found, damaged = store.load(manifest.cases)
    for path, fault in damaged.items():
        told = f"{path}: damaged record left out ({fault}); run the plan again to repair it"
        Console(stderr=True).print(render.printable(told), style="yellow", markup=False, soft_wrap=True)
    rows = leaderboard.table(manifest, found)
    title = f"{manifest.title} ({manifest.profile} profile)"
    if form == "rich":
        console.print(render.rich_table(title, rows, console.width))
    else:
        sys.stdout.write(render.FORMATS[form](title, rows))
