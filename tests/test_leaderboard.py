"""Tables: statistics against scipy, failures in the denominator, determinism, escaping."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import binomtest

from dlgbench import grid, leaderboard, plan, render
from dlgbench.case import Case
from dlgbench.columns import fitting
from dlgbench.columns import grid as columns
from dlgbench.records import Manifest, Record
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS, Spec


def case(seed: int = 0, image: int = 0, network: str = "lenet5", dataset: Spec | None = None) -> Case:
    return Case(
        network=NETWORKS.spec(network), dataset=dataset or DATASETS.spec("photos"),
        attack=ATTACKS.spec("dlg"), defense=DEFENSES.spec("none"), batch=1, resolution=32,
        preparation="fit", channels=3, classes=10,
        steps=300, dtype="float32", image=image, seed=seed,
    )  # fmt: skip


def record(one: Case, psnr: float, outcome: str, **changes: Any) -> Record:
    image = {"psnr": psnr, "mse": 10 ** (-psnr / 10), "ssim": 0.5, "label": 1, "label_found": 1}
    trivial = {"grey": [{"psnr": 12.0, "mse": 0.06, "ssim": 0.1}]}
    whole: dict[str, Any] = {
        "case": one, "status": "done", "outcome": outcome, "images": (image,), "baselines": trivial,
        "objective": 1e-6, "relative": 1e-8, "closures": 100, "cost": {"seconds": 2.0},
    }  # fmt: skip
    return Record(**{**whole, **changes})


def failure(one: Case, status: str = "error") -> Record:
    return record(
        one, 0, "failed", status=status, images=(), baselines={}, relative=None, reason="it | broke"
    )


@given(st.integers(0, 200), st.integers(1, 200))
def test_the_interval_is_wilsons(successes: int, trials: int) -> None:
    successes = min(successes, trials)
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert leaderboard.wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_failures_stay_in_every_denominator() -> None:
    records = [
        record(case(0), 50, "exact"),
        record(case(1), 25, "recognisable"),
        failure(case(2)),
        failure(case(3), "oom"),
        record(case(4), 5, "failed", status="diverged"),
    ]
    (row, *_) = leaderboard.rows(records)
    assert (row.recovered, row.exact, row.trials, row.broken, row.diverged) == (2, 1, 5, 2, 1)
    assert row.psnr == 5.0  # the median of 50, 25, 5 and two that are worse than all
    assert row.label_accuracy == 3 / 5


@pytest.mark.parametrize(("found", "share"), [
    ((3, 7, 7), 1.0),  # all, in another order
    ((7, 7, 7), 2 / 3),
    ((3, 3, 5), 1 / 3),  # once, where it is there once
])  # fmt: skip
def test_labels_count_for_whichever_image_they_were_found(found: tuple[int, ...], share: float) -> None:
    pairs = zip((7, 3, 7), found, strict=True)
    images = tuple({"psnr": 9.0, "mse": 0.1, "ssim": 0.1, "label": a, "label_found": b} for a, b in pairs)
    one = replace(case(), batch=3)
    (row, *_) = leaderboard.rows([record(one, 9, "failed", images=images)])
    assert row.label_accuracy == pytest.approx(share)


def test_a_median_that_falls_on_a_failure_is_undefined() -> None:
    (row, *_) = leaderboard.rows([record(case(0), 50, "exact"), failure(case(1)), failure(case(2))])
    assert row.psnr is None
    assert row.mse is None


def test_skipped_trials_are_no_failures_and_rank_last() -> None:
    skipped = failure(case(network="resnet18"), "skipped")
    rows = leaderboard.rows([skipped, failure(case(1))])
    assert [row.name for row in rows] == ["lenet5", "resnet18 preparation=fit classes=10"]
    assert columns(rows).lines[1][columns(rows).columns.index(recovered_column(rows))] == "skipped"


def recovered_column(rows: list[leaderboard.Row]) -> Any:
    return next(column for column in columns(rows).columns if column.title == "recovered")


def test_baselines_count_every_distinct_image_once() -> None:
    records = [record(case(seed, image), 50, "exact") for seed in range(3) for image in range(2)]
    rows = leaderboard.rows(records)
    assert [row.name for row in rows] == ["lenet5", "(grey)"]
    assert rows[1].psnr == 12.0


@given(st.randoms(use_true_random=False))
def test_tables_do_not_depend_on_the_order_of_records(shuffle: random.Random) -> None:
    records = [
        record(case(seed, network=name), 10 + seed, "failed")
        for seed in range(3)
        for name in ("lenet5", "lenet_dlg", "lenet5:activation=relu")
    ]
    expected = render.markdown("title", leaderboard.rows(records))
    shuffle.shuffle(records)
    assert render.markdown("title", leaderboard.rows(records)) == expected


def test_partial_rows_are_named_but_in_no_leaderboard() -> None:
    manifest = Manifest("p", "t", "quick", tuple(case(seed) for seed in range(3)))
    rows = leaderboard.table(manifest, {one.case.id: one for one in [record(case(0), 50, "exact")]})
    assert rows[0].partial
    assert "lenet5 (1 of 3 trials)" in render.markdown("t", rows)
    assert "lenet5" not in render.latex("t", rows)
    assert "lenet5" not in render.comma_separated("t", rows)
    assert json.loads(render.as_json("t", rows))["rows"][0]["partial"] is True


def test_a_record_made_before_an_option_existed_counts_where_the_option_is_spelled_out() -> None:
    noisy = [replace(case(seed), defense=DEFENSES.spec("noise:std=0.5")) for seed in (0, 1)]
    before = replace(noisy[0], defense=Spec("noise", (("std", 0.5),)))
    records = {one.id: record(one, 50, "exact") for one in (before, noisy[1])}
    [row, _] = leaderboard.table(Manifest("p", "t", "quick", tuple(noisy)), records)
    assert (row.trials, row.planned, row.exact) == (2, 2, 2)


NASTY = "folder:path=/a|b_c&d%e$f#{g}~^\\<script>[link](x)=`x`"


def test_text_from_outside_is_escaped_everywhere() -> None:
    rows = leaderboard.rows(
        [record(case(dataset=Spec("folder", (("path", NASTY),))), 50, "exact"), record(case(), 50, "exact")]
    )
    markdown = render.markdown("a | b", rows)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<script>" not in markdown
    latex = render.latex("50 % & more", rows)
    assert not re.search(r"(?<!\\)[%#]", latex)
    assert r"50 \% \& more" in latex


def test_csv_parses_back_and_holds_no_formula() -> None:
    nasty = Spec("folder", (("path", '=cmd("x"),\n1'),))
    rows = leaderboard.rows([record(case(dataset=nasty), 50, "exact")])
    parsed = list(csv.DictReader(io.StringIO(render.comma_separated("t", rows))))
    assert len(parsed) == len(rows)
    assert parsed[0]["dataset"].startswith("folder:path=")
    assert all(not value.startswith(("=", "+", "@")) for line in parsed for value in line.values())


def test_control_characters_never_reach_the_terminal() -> None:
    rows = leaderboard.rows([failure(case(dataset=Spec("folder", (("path", "\x1b[31mred[bold]"),))))])
    console = Console(file=io.StringIO(), width=300)
    console.print(render.rich_table("\x1b[2J", rows, 300))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "[bold]" in shown


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_narrow_terminal_loses_the_least_important_columns(width: int) -> None:
    whole = columns(leaderboard.rows([record(case(), 50, "exact")]))
    shown = fitting(whole, width)
    titles = [column.title for column in shown.columns]
    assert {"network", "recovered", "PSNR", "labels"} <= set(titles)
    widths = [
        max(len(cell) for cell in [title, *texts]) for title, *texts in zip(titles, *shown.lines, strict=True)
    ]
    assert sum(widths) + 3 * len(widths) <= width


def test_all_quick_profiles_together_are_a_taste() -> None:
    data = grid.Data(None)
    cases = [
        case for name in plan.shipped() for case in grid.manifest(plan.find(name), "quick", {}, data).cases
    ]
    assert {case.network.name for case in cases} == set(NETWORKS.entries)
    assert all(case.resolution == NETWORKS.entry(case.network.name).facts["resolution"] for case in cases)
    assert sum(map(grid.most_seconds, cases)) < 15 * 60
