"""Tables as rich, Markdown, CSV, LaTeX and JSON; everything that comes from outside is escaped."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields

from rich.box import HEAVY_HEAD
from rich.table import Table
from rich.text import Text

from dlgbench import columns, leaderboard, tradeoff
from dlgbench.columns import Grid, fitting
from dlgbench.leaderboard import Row
from dlgbench.records import Manifest, Record
from dlgbench.text import printable
from dlgbench.tradeoff import Rate, Tradeoff

Rows = Sequence[Row | Tradeoff]
RATES = ("naive", "adaptive")
"""The fields of a row that hold a `Rate`."""
_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "≥": r"$\geq$",
          "Δ": r"$\Delta$", "²": r"\textsuperscript{2}", "<": r"\textless{}", ">": r"\textgreater{}",
          "|": r"\textbar{}", "ε": r"$\varepsilon$", "δ": r"$\delta$", "±": r"$\pm$"}  # fmt: skip


def sheets(manifest: Manifest, records: Mapping[str, Record]) -> dict[str, tuple[str, Rows]]:
    """A plan's tables with their titles, by what is appended to the names of their files."""
    found: dict[str, tuple[str, Rows]] = {"": (manifest.heading, leaderboard.table(manifest, records))}
    if rows := tradeoff.table(manifest, records):
        found["-costs"] = (
            f"{manifest.title.rstrip('?')}, and what does it cost? ({manifest.profile} profile)",
            rows,
        )
    return found


def rich_table(title: str, rows: Rows, width: int) -> Table:
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
        style = "dim" if row.partial or row.trivial else None
        table.add_row(*(Text(printable(cell)) for cell in line), style=style)
    return table


def markdown(title: str, rows: Rows) -> str:
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


def comma_separated(title: str, rows: Rows) -> str:
    """RFC 4180 with one column per field of a row, full precision but for intervals; complete rows only."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(_fields(rows[0]) if rows else [])
    writer.writerows(map(_inert, _fields(row).values()) for row in complete(rows))
    return file.getvalue()


def latex(title: str, rows: Rows) -> str:
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


def as_json(title: str, rows: Rows) -> str:
    """The rows as they are, partial ones marked."""
    body = {"title": title, "rows": [{**asdict(row), "partial": row.partial} for row in rows]}
    return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[str, Rows], str]] = {
    "md": markdown, "csv": comma_separated, "tex": latex, "json": as_json,
}  # fmt: skip


def complete(rows: Rows) -> list[Row | Tradeoff]:
    """The rows that may stand in a leaderboard."""
    return [row for row in rows if not row.partial]


def _caption(whole: Grid, shown: Grid) -> str:
    shared = [f"{name}: {value}" for name, value in whole.shared.items()]
    hidden = len(whole.columns) - len(shown.columns)
    more = [f"{hidden} more columns: --format md, or a wider terminal"] if hidden else []
    return printable("; ".join(shared + more))


def _omitted(rows: Rows) -> str:
    told = [f"{_who(row)} ({row.trials} of {row.planned} trials)" for row in rows if row.partial]
    return f"\n\nPartial and therefore left out: {_markdown(', '.join(told))}." if told else ""


def _who(row: Row | Tradeoff) -> str:
    return row.name if row.defense in ("", "none") else f"{row.name} {row.defense}"


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~$!&])", r"\\\1", printable(text))
    return " ".join(escaped.split())


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(text))


def _fields(row: Row | Tradeoff) -> dict[str, object]:
    """A row's fields by name, those of a rate each with the name of the rate before it."""
    flat: dict[str, object] = {}
    for item in fields(row):
        value = getattr(row, item.name)
        if item.name in RATES:
            parts = asdict(value) if value else dict.fromkeys(part.name for part in fields(Rate))
            flat |= {f"{item.name}_{name}": part for name, part in parts.items()}
        else:
            flat[item.name] = value
    return flat


def _inert(value: object) -> object:
    """What stands in a cell; text that a spreadsheet would run as a formula is made plain text."""
    if isinstance(value, tuple):
        return "{:.4f}..{:.4f}".format(*value)
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
