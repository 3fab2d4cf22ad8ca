"""Tables as rich, Markdown, CSV, LaTeX and JSON; everything that comes from outside is escaped."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict

from rich.box import HEAVY_HEAD
from rich.table import Table
from rich.text import Text

from dlgbench import columns
from dlgbench.columns import Grid, fitting
from dlgbench.leaderboard import Row
from dlgbench.text import printable

_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "≥": r"$\geq$",
          "Δ": r"$\Delta$", "²": r"\textsuperscript{2}", "<": r"\textless{}", ">": r"\textgreater{}",
          "|": r"\textbar{}"}  # fmt: skip


def rich_table(title: str, rows: Sequence[Row], width: int) -> Table:
    """The table for a terminal of ``width`` characters, partial rows included and dimmed."""
    grid = fitting(whole := columns.grid(rows), width)
    table = Table(
        title=Text(printable(title), style="bold"),
        caption=Text(_caption(whole, grid)),
        box=HEAVY_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
        title_justify="left",
        caption_justify="left",
    )
    for column in grid.columns:
        table.add_column(
            Text(column.title),
            justify="left" if column.is_text else "right",
            overflow="fold",
            max_width=column.width,
        )
    for row, line in zip(rows, grid.lines, strict=True):
        style = "dim" if row.partial or not row.attack else None
        table.add_row(*(Text(printable(cell)) for cell in line), style=style)
    return table


def markdown(title: str, rows: Sequence[Row]) -> str:
    """A GitHub table of the complete rows, with the meaning of every column."""
    grid = columns.grid(complete(rows))
    rule = [":--" if column.is_text else "--:" for column in grid.columns]
    head = [_markdown(column.title) for column in grid.columns]
    lines = [head, rule, *([_markdown(cell) for cell in line] for line in grid.lines)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    shared = "".join(f"{name}: {_markdown(value)}. " for name, value in grid.shared.items())
    meaning = "; ".join(
        f"*{_markdown(column.title)}*: {_markdown(column.meaning)}" for column in grid.columns
    )
    return f"### {_markdown(title)}\n\n{text}\n\n{shared[:1].upper()}{shared[1:]}{meaning}.{_omitted(rows)}\n"


def comma_separated(title: str, rows: Sequence[Row]) -> str:
    """RFC 4180 with one column per field of `Row`, full precision; complete rows only."""
    file = io.StringIO()
    names = list(asdict(rows[0])) if rows else []
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(names)
    for row in complete(rows):
        values = asdict(row) | {"interval": "{:.4f}..{:.4f}".format(*row.interval)}
        writer.writerow([_inert("" if value is None else value) for value in values.values()])
    return file.getvalue()


def latex(title: str, rows: Sequence[Row]) -> str:
    """A table for the booktabs package; complete rows only."""
    grid = columns.grid(complete(rows))
    layout = "".join("l" if column.is_text else "r" for column in grid.columns)
    body = [" & ".join(map(_latex, line)) + r" \\" for line in grid.lines]
    head = " & ".join(_latex(column.title) for column in grid.columns) + r" \\"
    shared = ", ".join(f"{name}: {value}" for name, value in grid.shared.items())
    return "\n".join([
        r"\begin{table}", rf"\caption{{{_latex(f'{title}; {shared}')}}}",
        rf"\begin{{tabular}}{{{layout}}}", r"\toprule", head, r"\midrule", *body,
        r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def as_json(title: str, rows: Sequence[Row]) -> str:
    """The rows as they are, partial ones marked."""
    body = {"title": title, "rows": [{**asdict(row), "partial": row.partial} for row in rows]}
    return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[str, Sequence[Row]], str]] = {
    "md": markdown, "csv": comma_separated, "tex": latex, "json": as_json,
}  # fmt: skip


def complete(rows: Sequence[Row]) -> list[Row]:
    """The rows that may stand in a leaderboard."""
    return [row for row in rows if not row.partial]


def _caption(whole: Grid, shown: Grid) -> str:
    shared = [f"{name}: {value}" for name, value in whole.shared.items()]
    hidden = len(whole.columns) - len(shown.columns)
    more = [f"{hidden} more columns: --format md, or a wider terminal"] if hidden else []
    return printable("; ".join(shared + more))


def _omitted(rows: Sequence[Row]) -> str:
    told = [f"{row.name} ({row.trials} of {row.planned} trials)" for row in rows if row.partial]
    return f"\n\nPartial and therefore left out: {_markdown(', '.join(told))}." if told else ""


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~$!&])", r"\\\1", printable(text))
    return " ".join(escaped.split())


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(text))


def _inert(value: object) -> object:
    """Text that a spreadsheet would run as a formula, made plain text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
