"""Whole reconstructions beside a textbook loop's: how many are recovered, at what cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dlgbench import processes, trial
from dlgbench.benchmarks.textbook import Textbook
from dlgbench.case import Case
from dlgbench.compiler import Compiler
from dlgbench.measure import Row, Table, case, textbook
from dlgbench.registry import ATTACKS, DATASETS
from dlgbench.victims import secret_of

EXACT = 1e-4
"""The MSE of 40 dB."""
SOLVED = 5
"""Steps of the strongest attack: it starts beside the image."""


def compare(trials: int, steps: int, compiler: Compiler) -> Table:
    """On ``lenet_dlg`` our loop and our strongest attack beside the textbook's loop, on the same leaks.

    Both loops start from the same dummies.  Ours uses a process per core where that is faster, the
    textbook's torch's default threads.
    """
    cases = [case("lenet_dlg", image=i % 5, seed=i // 5, steps=steps) for i in range(trials)]
    solved = [replace(one, attack=ATTACKS.spec("spectral"), steps=SOLVED) for one in cases]
    rows = [_ours(cases, compiler), _ours(solved, compiler), _theirs(cases)]
    for row in rows:
        row["ratio"] = row["recovered per CPU-s"] / max(rows[-1]["recovered per CPU-s"], 1e-12)
    return rows


def _ours(cases: Sequence[Case], compiler: Compiler) -> Row:
    photos, setup = DATASETS.make(cases[0].dataset, None), trial.Setup("cpu", compiler=compiler)
    run = partial(processes.run, dataset=photos, setup=setup, show=lambda *told: None, waiting=len(cases))
    run([replace(one, steps=1) for one in cases])  # compiles
    started = time.perf_counter()
    found = [record for record, _ in run(cases)]
    return {
        "loop": f"dlgbench {cases[0].attack.name}",
        "steps": cases[0].steps,
        **_rates(
            [record.images[0]["mse"] for record in found],
            sum(record.closures for record in found),
            time.perf_counter() - started,
            sum(record.cost["cpu_seconds"] for record in found),
        ),
    }


def _theirs(cases: Sequence[Case]) -> Row:
    books = [textbook(one) for one in cases]
    started, worked = time.perf_counter(), time.process_time()
    for book in books:
        for _ in range(cases[0].steps):
            book.step()
    spent = time.perf_counter() - started, time.process_time() - worked
    errors = [_error(book, one) for book, one in zip(books, cases, strict=True)]
    closures = sum(book.closures for book in books)
    return {"loop": "textbook dlg", "steps": cases[0].steps, **_rates(errors, closures, *spent)}


def _error(book: Textbook, one: Case) -> float:
    """The MSE of a textbook reconstruction; infinite where it is no number."""
    secret = secret_of(one, DATASETS.make(one.dataset, None))
    error = float((book.images.detach().clamp(0, 1) - secret.images[0]).square().mean())
    return error if error == error else float("inf")


def _rates(errors: Sequence[float], closures: int, seconds: float, worked: float) -> Row:
    recovered = sum(error < EXACT for error in errors)
    return {
        "trials": len(errors), "recovered": recovered, "closures": closures, "seconds": seconds,
        "trials an hour": 3600 * len(errors) / seconds, "CPU-s": worked,
        "CPU-ms a closure": 1e3 * worked / closures, "recovered per CPU-s": recovered / worked,
    }  # fmt: skip
