"""``dlgbench bench``: measurements → a record and a table in the output directory."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlgbench import exits, footprint, measure, provenance, reconstructions, scaling, trial
from dlgbench.compiler import Compiler
from dlgbench.records import write
from dlgbench.registry import NETWORKS
from dlgbench.store import Store

WIDEST = 7
"""Columns of a table on a terminal."""
Rows = Sequence[Mapping[str, Any]]
SECTIONS = {
    "closures": "One closure, per case: the gradient's distance and its gradient in image and label",
    "reconstructions": "Whole reconstructions of lenet_dlg, recovered: MSE < 1e-4; CPU-s after starting",
    "shares": "Where a run's time goes, as shares",
    "widths": "A LeNet closure against the number of cases evaluated together",
    "resolutions": "A closure against the resolution, eager",
    "histories": "An iteration of L-BFGS alone, per row of 3172 numbers, against the number of pairs",
    "memory": "The most that a closure allocates, per case, beside weights, gradients and dummies",
}


def run(options: argparse.Namespace, console: Console) -> int:
    """Returns the exit code."""
    trial.quieten()
    provenance.exact_float32()
    store = Store(options.out)
    store.prepare()
    compiler = Compiler("on", lambda text: console.print(Text(text, style="yellow")))
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, measurement in _measurements(options.short, compiler).items():
        found[name] = []
        with console.status(SECTIONS[name]) as status:
            for row in measurement():
                found[name].append(row)
                status.update(Text(f"{SECTIONS[name]}: {next(iter(row.values()))} done"))
        console.print(_rich(name, found[name]))
    record = {"short": options.short, "provenance": provenance.facts(torch.device("cpu")), **_plain(found)}
    name = "bench-short" if options.short else "bench"
    write(store.root / "tables" / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
    write(store.root / "tables" / f"{name}.md", _markdown(record).encode())
    if options.json:
        print(json.dumps(record, indent=1))
    return exits.OK


def _measurements(short: bool, compiler: Compiler) -> dict[str, Callable[[], Iterable[Mapping[str, Any]]]]:
    if short:
        return {
            "closures": lambda: measure.closures(["lenet_dlg"], 20, compiler),
            "shares": lambda: [measure.shares("lenet_dlg", 16, 10, compiler)],
            "histories": lambda: scaling.histories([20, 100], 8, 3),
            "memory": lambda: footprint.memory(["lenet_dlg"], compiler),
        }
    deep = [name for name, entry in NETWORKS.entries.items() if entry.facts["resolution"] > 32]
    return {
        "closures": lambda: measure.closures(["lenet_dlg", *deep], 7, compiler),
        "reconstructions": lambda: reconstructions.compare(30, 300, compiler),
        "shares": lambda: [
            measure.shares("lenet_dlg", 30, 30, compiler), measure.shares("resnet18", 1, 3, compiler)
        ],
        "widths": lambda: scaling.widths([1, 2, 4, 8, 16, 32, 64, 128, 256], 5, compiler),
        "resolutions": lambda: scaling.resolutions("resnet18", [33, 64, 128, 224, 299], 5),
        "histories": lambda: scaling.histories([5, 10, 20, 50, 100], 8, 5),
        "memory": lambda: footprint.memory(["lenet_dlg", *deep], compiler),
    }  # fmt: skip


def _plain(found: Mapping[str, Rows]) -> dict[str, list[dict[str, Any]]]:
    """As strict JSON: numbers rounded to four digits, and None for what is not one."""
    return {
        name: [{key: _rounded(v) for key, v in row.items()} for row in rows] for name, rows in found.items()
    }


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _show(value: Any) -> str:
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _rich(name: str, rows: Rows) -> Table:
    """A line per row or, where they are too wide for a terminal, a column per row."""
    lines = [[*map(_show, row.values())] for row in rows]
    head = list(rows[0])
    if len(head) > WIDEST:
        head, *lines = map(list, zip(head, *lines, strict=True))
    table = Table(*head, title=SECTIONS[name], box=box.SIMPLE_HEAD, title_justify="left")
    for line in lines:
        table.add_row(*line)
    return table


def _markdown(record: Mapping[str, Any]) -> str:
    lines = [f"Measured by `dlgbench bench` on {record['provenance']['device']}.", ""]
    for name in (name for name in SECTIONS if name in record):
        rows = record[name]
        lines += [f"**{SECTIONS[name]}**", "", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
        lines += [f"| {' | '.join(map(_show, row.values()))} |" for row in rows] + [""]
    return "\n".join(lines)
