"""What there is to run, and what the doctor found, as tables for people or JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dlgbench import plan
from dlgbench.doctor import Finding
from dlgbench.registry import KINDS, Entry, Option

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def tables() -> Group:
    """One table of the plans and one of every kind of name."""
    plans = _table("plans", "asks")
    for name in plan.shipped():
        plans.add_row(Text(name), Text(plan.find(name).title))
    kinds = []
    for registry in KINDS.values():
        table = _table(f"{registry.kind}s", "is", "options and their defaults")
        for entry in registry.entries.values():
            table.add_row(
                Text(entry.name), Text(entry.summary), Text("\n".join(map(_option, entry.options.values())))
            )
        kinds.append(table)
    return Group(plans, *kinds)


def as_json() -> str:
    """All names with their options."""
    body = {
        f"{registry.kind}s": dict(map(_described, registry.entries.values())) for registry in KINDS.values()
    }
    titles = {name: plan.find(name).title for name in plan.shipped()}
    return json.dumps({"plans": titles, **body}, indent=1, ensure_ascii=False)


def findings(found: Sequence[Finding]) -> Table:
    """What the doctor found."""
    table = _table("check", "found", "remedy")
    for finding in found:
        name = Text(finding.check, style=_COLOURS[finding.level])
        table.add_row(name, Text(finding.detail), Text(finding.remedy))
    return table


def _table(*titles: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for index, title in enumerate(titles):
        table.add_column(title, overflow="fold", no_wrap=index == 0, style="cyan" if index == 0 else None)
    return table


def _option(option: Option) -> str:
    default = "required" if option.default is None else option.default
    choices = f" ({', '.join(option.choices)})" if option.choices else ""
    return f"{option.name}={default}{choices}"


def _described(entry: Entry) -> tuple[str, dict[str, Any]]:
    options = {
        option.name: {
            "type": option.kind.__name__,
            "default": option.default,
            "choices": list(option.choices),
        }
        for option in entry.options.values()
    }
    return entry.name, {"summary": entry.summary, "facts": dict(entry.facts), "options": options}
