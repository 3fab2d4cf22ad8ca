"""``dlgbench recommend``: the cheapest defence that prevents the leak, and why not the others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlgbench import exits, records, tradeoff
from dlgbench.errors import UsageError
from dlgbench.registry import DEFENSES
from dlgbench.store import Store
from dlgbench.text import printable
from dlgbench.tradeoff import Rate, Tradeoff


@dataclass(frozen=True)
class Verdict:
    """One defence of one network: whether it will do, and why."""

    row: Tradeoff
    will_do: bool
    why: str


def run(options: argparse.Namespace, console: Console) -> int:
    """Returns 1 where for some network no defence will do; raises UsageError where nothing was measured."""
    found = measured(Store(options.out), options.network)
    groups = [
        judged(list(rows), options.max_accuracy_loss, options.max_recovery)
        for _, rows in groupby(found, key=_subject)
    ]
    if options.json:
        print(json.dumps([_plain(group) for group in groups], indent=1, ensure_ascii=False, allow_nan=False))
    else:
        for group in groups:
            _print(console, group)
    return exits.OK if all(best(group) for group in groups) else exits.FAILED


def measured(store: Store, network: str | None) -> list[Tradeoff]:
    """The trade-offs of all plans in the store: of those of the same name, the one with the most trials."""
    found: dict[tuple[Any, ...], Tradeoff] = {}
    for manifest in records.manifests(store.plans):
        for row in tradeoff.table(manifest, store.load(manifest.cases)[0]):
            name = (*_subject(row), row.defense, row.batch)
            found[name] = max(found.get(name, row), row, key=lambda one: one.trials)
    rows = [row for row in found.values() if network in (None, row.name, row.name.partition(":")[0])]
    if not rows:
        raise UsageError(
            f"expected defences measured in {store.root}, got none"
            + (f" of {network}" if network else "")
            + "; run `dlgbench run defenses` or name another directory with --out"
        )
    return sorted(rows, key=_subject)


def _subject(row: Tradeoff) -> tuple[str, str, int]:
    """What the defences that are compared have in common."""
    return row.name, row.dataset, row.resolution


def judged(rows: Sequence[Tradeoff], most_lost: float, most_recovered: float) -> list[Verdict]:
    """All that will do, the cheapest first, then the others by what is recovered.

    Cheaper is what takes less time an update, to a tenth of the undefended one's; then what sends less.
    """
    found = [_judge(row, most_lost, most_recovered) for row in rows]
    found = [replace(one, why=one.why + _repeated(one.row, rows)) if one.will_do else one for one in found]
    cheapest = sorted((one for one in found if one.will_do), key=lambda one: _price(one.row))
    return cheapest + sorted((one for one in found if not one.will_do), key=lambda one: _risk(one.row))


def best(verdicts: Sequence[Verdict]) -> Tradeoff | None:
    """The cheapest that will do."""
    return next((verdict.row for verdict in verdicts if verdict.will_do), None)


def _judge(row: Tradeoff, most_lost: float, most_recovered: float) -> Verdict:
    strongest, lost = row.strongest, row.lost_interval[1] if row.lost_interval else row.lost
    if row.adaptive is None or not row.adaptive.trials or strongest is None:
        return Verdict(row, False, f"was not attacked by one who knows it{_because(row)}")
    if row.partial or row.broken or lost is None:
        return Verdict(row, False, f"was not measured to the end{_because(row)}")
    leak, doubtful = _leak(strongest), max(row.rates, key=lambda rate: (rate.risk, rate.recovered))
    if doubtful.risk > most_recovered:
        return Verdict(row, False, f"{_leak(doubtful)}, more than {most_recovered:.0%}")
    cost = f"costs at most {max(lost, 0):.1%} of accuracy"
    if lost > most_lost:
        return Verdict(row, False, f"{leak}, but it {cost}, more than {most_lost:.1%}")
    time = f"takes {row.slower:.1f} times as long" if row.slower else "takes an unknown time"
    sent = filesize.decimal(round(row.update_bytes or 0))
    labels = "" if row.label_accuracy is None else f"; of the labels {row.label_accuracy:.0%} were found"
    return Verdict(row, True, f"{leak}; it {cost}, {time} and sends {sent}{labels}")


def _leak(rate: Rate) -> str:
    told = f"{rate.recovered} of {rate.trials}" + (f" and {rate.partly} in part" if rate.partly else "")
    named = f" ({rate.identified} identified)" if (rate.identified or 0) > rate.recovered else ""
    return f"{rate.attack} recovered {told}{named}, which allows for {rate.risk:.0%}"


def _repeated(row: Tradeoff, rows: Sequence[Tradeoff]) -> str:
    """What leaks where the same batch is seen for several rounds, if that was measured."""
    for other in rows:
        spec = DEFENSES.spec(other.defense)
        once = replace(
            spec, options=tuple((key, 1 if key == "rounds" else value) for key, value in spec.options)
        )
        again = spec != once == DEFENSES.spec(row.defense) and other.batch == row.batch
        if again and other.strongest:
            return f"; seen for {spec.get('rounds')} rounds, {_leak(other.strongest)}"
    return ""


def _because(row: Tradeoff) -> str:
    broken = f"{row.broken} trials broke; run them again with --retry-failed" if row.broken else ""
    return f": {broken or row.reason}" if broken or row.reason else ""


def _price(row: Tradeoff) -> tuple[Any, ...]:
    return round(row.slower or 0, 1), row.update_bytes, row.defense, row.batch


def _risk(row: Tradeoff) -> tuple[Any, ...]:
    rate = row.strongest
    return rate.risk if rate else 2, row.defense, row.batch


def _print(console: Console, verdicts: Sequence[Verdict]) -> None:
    chosen, one = best(verdicts), verdicts[0].row
    head = f"{one.name} on {one.dataset} at {one.resolution} px: "
    head += chosen.title if chosen else "no defence that was measured will do"
    console.print(Text(printable(head), style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for verdict in verdicts:
        style = "green" if verdict.will_do else "default"
        table.add_row(Text(printable(verdict.row.title), style=style), Text(printable(verdict.why)))
    console.print(table, "")


def _plain(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    chosen = best(verdicts)
    return {
        "network": verdicts[0].row.name,
        "dataset": verdicts[0].row.dataset,
        "resolution": verdicts[0].row.resolution,
        "recommended": chosen and {"defense": chosen.defense, "batch": chosen.batch},
        "verdicts": [{**asdict(one.row), "will_do": one.will_do, "why": one.why} for one in verdicts],
    }
