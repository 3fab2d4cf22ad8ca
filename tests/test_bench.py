"""The short form of ``dlgbench bench``: ratios that hold on any machine, never seconds."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from dlgbench import bench, cli, exits, footprint, measure, reconstructions
from dlgbench.compiler import Compiler


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out / "cache"))
        assert cli.main(["bench", "--short", "--out", str(out)]) == exits.OK
    return out / "tables"


def section(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "bench-short.json").read_text())[name]
    return rows


def test_a_lenet_closure_is_several_times_as_fast_as_the_textbooks(short: Path) -> None:
    """Measured: 7 to 10 times compiled, 4 times eager."""
    (row,) = section(short, "closures")
    assert row["ratio"] > (3 if row["closure"] == "compiled" else 2)
    assert row["differs by"] < 1e-4


def test_a_closure_counts_the_operations_of_the_textbooks(short: Path) -> None:
    """Seven convolutions of every layer but the first, which needs no gradient of its input before the
    second pass, and as many products of the last layer."""
    (row,) = section(short, "closures")
    layers = [12 * 3 * 25 * 16**2, 12 * 12 * 25 * 8**2, 12 * 12 * 25 * 8**2, 768 * 100]
    assert row["GFLOP"] == pytest.approx(2e-9 * (7 * sum(layers)), rel=0.05)


def test_an_iteration_of_lbfgs_is_faster_than_torchs(short: Path) -> None:
    """Measured: 6 times with 100 pairs, 3 times with 20."""
    for row in section(short, "histories"):
        assert row["torch ms"] > 1.5 * row["ours ms"]


def test_shares_are_shares(short: Path) -> None:
    (row,) = section(short, "shares")
    assert row["closures"] + row["L-BFGS"] + row["rest"] == pytest.approx(1, abs=1e-3)
    assert row["rest"] < 0.3  # measured: 0.1


def test_a_closure_takes_less_memory_than_the_textbooks(short: Path) -> None:
    """Measured: 0.27 compiled, 0.95 eager."""
    (row,) = section(short, "memory")
    assert row["ratio"] == pytest.approx(row["ours MB"] / row["textbook MB"], rel=1e-2)
    assert row["ratio"] < 1


def twelve_megabytes() -> None:
    first = torch.zeros(2**21)
    del first
    second, third = torch.zeros(2**21), torch.zeros(2**20)
    del second, third


def peak_among_holes() -> float:
    """Of a call, in a process that has freed every other of many tensors before."""
    pieces = [torch.zeros(2**13) for _ in range(800)]
    del pieces[::2]
    return footprint.peak(twelve_megabytes)


def test_memory_is_what_is_allocated_at_once_whatever_was_freed_before() -> None:
    """Eight and four megabytes together; and the process that measures is one of its own."""
    before = dict(os.environ)
    assert footprint.alone(peak_among_holes) == pytest.approx(12 * 2**20, rel=0.05)
    assert footprint.alone(os.getpid) != os.getpid()
    assert dict(os.environ) == before


def test_the_table_says_where_it_comes_from(short: Path) -> None:
    text = (short / "bench-short.md").read_text()
    record = json.loads((short / "bench-short.json").read_text())
    assert record["provenance"]["versions"]["torch"] == version("torch")
    assert text.startswith("Measured by `dlgbench bench` on ")
    assert "| lenet_dlg |" in text


def test_functions_are_timed_in_turn() -> None:
    calls: list[str] = []
    seconds = measure.alternating([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    assert calls == ["a", "b"] * 3
    assert [len(found) for found in seconds] == [2, 2]


def test_what_is_recovered_is_counted() -> None:
    """Two steps are too few for either loop; the strongest attack needs none."""
    ours, solved, theirs = reconstructions.compare(2, 2, Compiler("off"))
    assert [row["recovered"] for row in (ours, solved, theirs)] == [0, 2, 0]
    assert ours["closures"] == theirs["closures"]
    assert all(row["trials"] == 2 and row["CPU-s"] > 0 for row in (ours, solved, theirs))


def test_the_rate_of_matrix_products_bounds_that_of_the_closure() -> None:
    (row,) = measure.closures(["lenet_dlg"], 1, Compiler("off"))
    assert 0 < row["of GEMM"] < 1
    assert row["closure"] == "eager"


def test_numbers_that_are_none_are_shown_as_none() -> None:
    assert bench._plain({"a": [{"x": float("nan"), "y": 1.23456, "z": None}]}) == {
        "a": [{"x": None, "y": 1.235, "z": None}]
    }
