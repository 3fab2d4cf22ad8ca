"""What is stored, on a console or standard output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlgbench import render
from dlgbench.records import Manifest, Record
from dlgbench.store import Store
from dlgbench.text import printable


def print_tables(console: Console, store: Store, manifests: Sequence[Manifest], form: str) -> None:
    """The plans' tables, one JSON list of them, and what is missing from them through damage."""
    tables: list[tuple[str, render.Rows]] = []
    for manifest in manifests:
        found, damaged = store.load(manifest.cases)
        for path, fault in damaged.items():
            told = f"{path}: damaged record left out ({fault}); run the plan again to repair it"
            Console(stderr=True).print(printable(told), style="yellow", markup=False, soft_wrap=True)
        tables += render.sheets(manifest, found).values()
    if form == "rich":
        for title, rows in tables:
            console.print(render.rich_table(title, rows, console.width))
    elif form == "json":
        print(json.dumps([json.loads(render.as_json(*table)) for table in tables], indent=1))
    else:
        print("\n".join(render.FORMATS[form](*table) for table in tables), end="")


def print_record(console: Console, record: Record) -> None:
    """What a person wants to know of one trial; `records.encode` has all of it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(record):
        table.add_row(Text(printable(name)), Text(printable(value)))
    console.print(table)


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    yield "id", record.case.id
    for name in (
        "status",
        "reason",
        "outcome",
        "flags",
        "objective",
        "relative",
        "convergence_step",
        "closures",
    ):
        value = getattr(record, name)
        yield name, ", ".join(value) if isinstance(value, tuple) else _short(value)
    for name, value in record.case.plain().items():
        yield name, _pairs(value) if isinstance(value, dict) else _short(value)
    for index, image in enumerate(record.images):
        yield f"image {index}", _pairs(image)
    for name, images in record.baselines.items():
        yield f"baseline {name}", "; ".join(map(_pairs, images))
    for name, trace in record.history.items():
        yield f"{name} by step", f"{_short(trace[0])} … {_short(trace[-1])} in {len(trace) - 1} steps"
    for name, value in (record.utility | record.cost | record.provenance).items():
        yield name, _pairs(value) if isinstance(value, dict) else _short(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: object) -> str:
    return "–" if value is None or value == "" else f"{value:.5g}" if isinstance(value, float) else str(value)
