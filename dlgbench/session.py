"""``dlgbench run``: what the arguments ask for → cases → a run → tables and plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from lightning_fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlgbench import exits, plan, runner, trial, views
from dlgbench.case import Case
from dlgbench.compiler import Compiler
from dlgbench.display import display, label
from dlgbench.errors import EnvironmentBroken, UsageError
from dlgbench.grid import Data, manifest, most_seconds, why_not
from dlgbench.records import Manifest
from dlgbench.runner import Limits, Summary
from dlgbench.store import Store
from dlgbench.text import printable
from dlgbench.trial import Setup


def run(options: argparse.Namespace, console: Console) -> int:
    """Returns the exit code; raises UsageError before anything is computed or written."""
    trial.quieten()
    root = options.data_root and options.data_root.expanduser()
    store, data = Store(options.out), Data(root)
    manifests = _manifests(options, data)
    cases = list(dict.fromkeys(case for one in manifests for case in one.cases))[: options.limit]
    limits = Limits(options.force, options.retry_failed, options.time_limit * 60)
    if options.dry_run:
        return _dry_run(options, console, store, cases, limits, data)
    _check_device(options)
    store.prepare()
    for one in manifests:
        one.save(store.plans)
    found, damaged = store.load(cases)
    for path, fault in damaged.items():
        told = printable(f"{path}: damaged record, computed anew ({fault})")
        console.print(Text(told, style="yellow"))
    todo = runner.pending(cases, found, limits, data)
    watch = display(console, len(todo))
    compiler = Compiler(options.compile, lambda text: console.print(Text(printable(text), style="yellow")))
    setup = Setup(options.accelerator, options.trial_timeout * 60, store.tensorboard, compiler)
    with watch.live():
        summary = runner.run(todo, store, data, setup, limits, watch)
    return _report(options, console, store, manifests, summary, len(cases) - len(todo))


def _manifests(options: argparse.Namespace, data: Data) -> list[Manifest]:
    names = [n for name in options.plans for n in (plan.shipped() if name == "all" else [name])]
    only: dict[str, list[str]] = {}
    for path, value in map(_assignment, options.only):
        only.setdefault(path, []).append(value)
    sizes = {name: getattr(options, name) for name in ("seeds", "images", "steps", "dtype")}
    pins = [*map(_assignment, options.pins), *((k, str(v)) for k, v in sizes.items() if v is not None)]
    found = []
    for name in dict.fromkeys(names):
        chosen = plan.find(name)
        for path, value in pins:
            chosen = chosen.pin(path, value)
        found.append(manifest(chosen, options.profile, only, data))
    if not any(one.cases for one in found):
        wanted = "".join(f" with {path}={'|'.join(values)}" for path, values in only.items())
        raise UsageError(
            f"expected at least one case{wanted}, got none in the {options.profile} profile of "
            f"{', '.join(one.plan for one in found)}; another --profile has more, and --dry-run lists them"
        )
    return [one for one in found if one.cases]


def _assignment(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not equals or not value:
        raise UsageError(f"expected FIELD=VALUE, got {text!r}; for example network=resnet18")
    return path, value


def _check_device(options: argparse.Namespace) -> None:
    if options.devices > 1:
        raise UsageError(
            f"--devices: expected 1, got {options.devices}; several devices would average the gradients of "
            "unrelated trials: start one `dlgbench run` per device, each with its own --only, same --out"
        )
    try:
        trial.device_of(options.accelerator)
    except (MisconfigurationException, RuntimeError) as error:
        raise EnvironmentBroken(
            f"--accelerator {options.accelerator}: {error}; use --accelerator cpu"
        ) from None


def _dry_run(
    options: argparse.Namespace,
    console: Console,
    store: Store,
    cases: Sequence[Case],
    limits: Limits,
    data: Data,
) -> int:
    found, _ = store.load(cases)
    todo = set(runner.pending(cases, found, limits, data))
    rows = [
        (
            case,
            "missing" if case in todo else "cached",
            why_not(case, data),
            most_seconds(case) if case in todo else 0.0,
        )
        for case in cases
    ]
    total = sum(seconds for _, _, reason, seconds in rows if not reason)
    if options.json:
        told = [
            {"id": case.id, "state": state, "skip": reason, "at_most_seconds": round(s), "case": case.plain()}
            for case, state, reason, s in rows
        ]
        print(json.dumps({"at_most_seconds": round(total), "cases": told}, indent=1))
        return exits.OK
    table = Table("id", "case", "steps", "state", "at most", box=None, header_style="bold", pad_edge=False)
    for case, state, reason, seconds in rows:
        state = printable(f"skipped: {reason}") if reason else state
        table.add_row(case.id, Text(label(case)), str(case.steps), Text(state), f"{seconds:.0f} s")
    console.print(table)
    console.print(
        f"{len(todo)} of {len(cases)} cases are missing; at most {total / 60:.0f} minutes on two CPU cores"
    )
    return exits.OK


def _report(
    options: argparse.Namespace,
    console: Console,
    store: Store,
    manifests: Sequence[Manifest],
    summary: Summary,
    cached: int,
) -> int:
    for one in manifests:
        if store.stale(one):
            store.plot(one)
            store.tabulate(one)  # last: where the tables are new, all is
    views.print_tables(console, store, manifests, "json" if options.json else "rich")
    broken = sum(record.broken for one in manifests for record in store.load(one.cases)[0].values())
    console.print(
        f"{len(summary.computed)} trials computed, {cached} were there, {broken} are broken; tables, "
        f"plots and records are in {store.root}; curves: tensorboard --logdir {store.tensorboard} "
        "--samples_per_plugin images=200",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if summary.out_of_time:
        return exits.OUT_OF_TIME
    return exits.FAILED if broken else exits.OK
