"""The command line: it reads arguments, calls one function each, and returns an exit code."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from dlgbench import __version__, exits
from dlgbench.errors import EnvironmentBroken, UsageError
from dlgbench.text import printable


class Terminal(Console):
    """A console that falls silent when its reader has gone, so that a run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Stopped(BaseException):
    """A signal asked us to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 well, 1 a trial broke, 2 usage, 3 out of time,
    4 environment broken, 130 and 143 on SIGINT and SIGTERM."""
    options = parser().parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        code: int = options.command(options)
        sys.stdout.flush()
    except UsageError as error:
        return _complain(str(error), exits.USAGE)
    except EnvironmentBroken as error:
        return _complain(str(error), exits.BROKEN)
    except Stopped as stopped:
        return _complain(
            "stopped; finished trials and compiled code are saved, and the same command goes on",
            128 + stopped.number,
        )
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.OK
    except OSError as error:  # such as a full disk; what is saved is whole
        return _complain(f"{error}; mend it, and the same command goes on", exits.BROKEN)
    return code


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = argparse.ArgumentParser(prog="dlgbench", description="Does this gradient leak my data?")
    top.add_argument("--version", action="version", version=f"dlgbench {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _run_arguments(_command(commands, "run", run, "run the trials of plans and print their leaderboards"))
    _command(commands, "list", list_names, "list plans, networks, datasets, attacks and defenses")
    table = _command(commands, "table", tables, "print the leaderboards of finished runs")
    table.add_argument("plans", nargs="*", metavar="PLAN", help="only these plans' tables")
    table.add_argument("--format", choices=("rich", "md", "csv", "tex"), default="rich", help="default: rich")
    _recommend_arguments(
        _command(commands, "recommend", recommend, "name the cheapest defense that prevents the leak")
    )
    show = _command(commands, "show", show_record, "show everything that is known of one trial")
    show.add_argument("id", metavar="ID", help="the record's id, or its first digits")
    measure = _command(commands, "bench", bench, "measure the engine beside a textbook loop")
    measure.add_argument("--short", action="store_true", help="LeNet alone, a minute or two")
    _command(commands, "doctor", doctor, "say what is wrong with this installation, and the remedy")
    return top


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, function: object, text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(command=function)
    command.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="results (default: runs)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _run_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("plans", nargs="+", metavar="PLAN", help="a plan's name, a TOML file, or 'all'")
    add("--profile", choices=("quick", "standard", "paper"), default="quick", help="default: quick")
    add(
        "--only",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="only cases with this value, e.g. network=resnet18 or seed=3; repeat a field for 'or'",
    )
    add(
        "--set",
        action="append",
        default=[],
        dest="pins",
        metavar="FIELD=VALUE",
        help="set a field for all cases, e.g. network.activation=relu or batch=2",
    )
    for name in ("seeds", "images", "steps"):
        add(f"--{name}", type=_positive, metavar="N", help=f"number of {name}, instead of the profile's")
    add("--dtype", help="float32 or float64 (default: the plan's)")
    add("--accelerator", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add(
        "--devices",
        type=_positive,
        default=1,
        metavar="N",
        help="only 1: trials are independent (see README)",
    )
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the attacks' closures: auto (default) where that saves time; kept for later runs",
    )
    add("--data-root", type=Path, metavar="DIR", help="where torchvision's datasets lie")
    add("--dry-run", action="store_true", help="list the cases, cached or missing, and estimate the time")
    add("--limit", type=_positive, metavar="N", help="only the first N cases; their rows are partial")
    add(
        "--time-limit",
        type=_minutes,
        default=float("inf"),
        metavar="MINUTES",
        help="stop the run after this time",
    )
    add(
        "--trial-timeout",
        type=_minutes,
        default=float("inf"),
        metavar="MINUTES",
        help="give up on a batch of trials after this",
    )
    add(
        "--retry-failed", action="store_true", help="repeat trials that broke (error, out of memory, timeout)"
    )
    add("--force", action="store_true", help="repeat all trials")


def _recommend_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--max-accuracy-loss",
        type=_share,
        default=0.02,
        metavar="SHARE",
        help="accuracy that it may cost, by the upper end of the interval (default: 0.02)",
    )
    add(
        "--max-recovery",
        type=_share,
        default=0.2,
        metavar="SHARE",
        help="trials that may be recovered or identified, by the upper end of the interval (default: 0.2)",
    )
    add("--network", metavar="NAME", help="of this network only")


def run(options: argparse.Namespace) -> int:
    """``dlgbench run``."""
    return _with_torch("session", options)


def list_names(options: argparse.Namespace) -> int:
    """``dlgbench list``."""
    from dlgbench import listing

    print(listing.as_json()) if options.json else _console(options).print(listing.tables(), soft_wrap=False)
    return exits.OK


def tables(options: argparse.Namespace) -> int:
    """``dlgbench table``."""
    from dlgbench import records, views
    from dlgbench.store import Store

    store = Store(options.out)
    wanted = [m for m in records.manifests(store.plans) if not options.plans or m.plan in options.plans]
    if not wanted:
        raise UsageError(
            f"expected runs in {options.out}, got none{' of these plans' if options.plans else ''}; "
            "start one with `dlgbench run all` or name another directory with --out"
        )
    views.print_tables(_console(options), store, wanted, "json" if options.json else options.format)
    return exits.OK


def recommend(options: argparse.Namespace) -> int:
    """``dlgbench recommend``."""
    from dlgbench import recommend

    return recommend.run(options, _console(options))


def show_record(options: argparse.Namespace) -> int:
    """``dlgbench show``."""
    from dlgbench import records, views
    from dlgbench.store import Store

    folder = Store(options.out).records
    found = sorted(path for path in folder.glob("*.json") if path.stem.startswith(options.id))
    if len(found) != 1:
        raise UsageError(
            f"expected the id of one record in {folder}, got {options.id!r}, which fits {len(found)}"
        )
    try:
        record = records.load(found[0])
    except records.Damaged as error:
        raise UsageError(f"{found[0]}: expected a sound record, got {error}; run its plan again") from None
    if options.json:
        sys.stdout.write(records.encode(record))
    else:
        views.print_record(_console(options), record)
    return exits.OK


def bench(options: argparse.Namespace) -> int:
    """``dlgbench bench``."""
    return _with_torch("bench", options)


def doctor(options: argparse.Namespace) -> int:
    """``dlgbench doctor``."""
    from dlgbench import doctor, listing

    findings = doctor.examine(options.out)
    if options.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        _console(options).print(listing.findings(findings))
    return exits.BROKEN if doctor.broken(findings) else exits.OK


def _with_torch(module: str, options: argparse.Namespace) -> int:
    """Call ``run`` of a module that imports torch."""
    _quiet()
    try:
        command = importlib.import_module(f"dlgbench.{module}")
    except Exception as error:  # whatever an unusable torch raises at import
        raise EnvironmentBroken(
            f"expected a working torch, got {type(error).__name__}: {error}; "
            "run `dlgbench doctor` for the remedy"
        ) from error
    code: int = command.run(options, _console(options))
    return code


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text!r}")
    return share


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text!r}")
    return minutes


def _quiet() -> None:
    """Before torch is imported: room for its kernels, and no launcher's variables."""
    from dlgbench.doctor import LAUNCHER

    # DenseNet-121's closure needs some 1000 convolutions; where they do not fit, they are made anew each time
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    for name in [n for n in os.environ if n in LAUNCHER or n.startswith("SLURM_")]:
        del os.environ[name]  # with them, the loggers of all but one process write nothing


def _console(options: argparse.Namespace) -> Console:
    """Where people read; with --json that is standard error, since standard output is for programs."""
    return Terminal(stderr=options.json)


def _complain(message: str, code: int) -> int:
    Console(stderr=True).print(
        printable(message), style="red" if code else "yellow", markup=False, highlight=False, soft_wrap=True
    )
    return code


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
