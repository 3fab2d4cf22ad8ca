"""What is published: every number in the README and in results/ follows from the records beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dlgbench import bench, measure, records, render
from dlgbench.compiler import expected_seconds
from dlgbench.leak import Leak
from dlgbench.metrics import TIERS, tier
from dlgbench.records import Manifest
from dlgbench.store import Store
from dlgbench.victims import network_of

ROOT = Path(__file__).parents[1]
RESULTS = Store(ROOT / "results")
MANIFESTS = records.manifests(RESULTS.plans)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """What stands in the README between the marks of ``name``."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert found, f"the README has no block {name!r}"
    return found[1]


def test_every_published_record_is_sound_and_belongs_to_a_plan() -> None:
    sound, damaged = records.load_all(RESULTS.records)
    assert not damaged
    assert set(sound) == {i for manifest in MANIFESTS for i in manifest.ids}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest.name)
def test_published_tables_are_the_records_tables_byte_for_byte(manifest: Manifest) -> None:
    found, _ = RESULTS.load(manifest.cases)
    sheets = render.sheets(manifest, found)
    assert list(sheets) == (["", "-costs"] if manifest.plan in ("defenses", "transfer") else [""])
    for name, (title, rows) in sheets.items():
        assert not any(row.partial for row in rows)
        for suffix, rendered in render.FORMATS.items():
            text = (RESULTS.root / "tables" / f"{manifest.name}{name}.{suffix}").read_bytes()
            assert text == rendered(title, rows).encode()


def test_the_table_in_the_readme_is_the_published_one() -> None:
    (standard,) = [m for m in MANIFESTS if m.plan == "architectures" and m.profile == "standard"]
    table = (RESULTS.root / "tables" / f"{standard.name}.md").read_text(encoding="utf-8")
    assert block("table").strip() == table.strip()


@pytest.mark.parametrize("name", ["bench", "bench-epyc"])
def test_the_published_benchmarks_are_their_records(name: str) -> None:
    record = json.loads((RESULTS.root / "tables" / f"{name}.json").read_text(encoding="utf-8"))
    assert not record["short"]
    assert (RESULTS.root / "tables" / f"{name}.md").read_text(encoding="utf-8") == bench._markdown(record)


def test_the_benchmark_in_the_readme_is_the_published_one() -> None:
    record = json.loads((RESULTS.root / "tables" / "bench.json").read_text(encoding="utf-8"))
    ours, strongest, theirs = record["reconstructions"]
    pairs = [(theirs[name], ours[name]) for name in ("trials an hour", "recovered per CPU-s")]
    pairs += [(theirs["recovered per CPU-s"], strongest["recovered per CPU-s"])]
    expected = [[*pair, pair[1] / pair[0]] for pair in pairs]
    expected += [[row["textbook ms"], row["ours ms"], row["ratio"]] for row in record["closures"][1:]]
    shown = [line.split("|")[2:5] for line in block("bench").splitlines()[2:]]
    assert [[cell.strip() for cell in cells] for cells in shown] == [
        [bench._show(value) for value in values] for values in expected
    ]


def test_what_the_readme_says_of_the_deep_networks_follows_from_the_benchmarks() -> None:
    tables = [RESULTS.root / "tables" / f"{name}.json" for name in ("bench", "bench-epyc")]
    records = [json.loads(table.read_text(encoding="utf-8")) for table in tables]
    here, there = (record["closures"][1:] for record in records)
    shares = [[100 * row["of GEMM"] for row in rows] for rows in (here, there)]
    ratios = [row["ratio"] for row in there]
    lows, highs = map(min, shares), map(max, shares)
    said = [f"at {low:.0f} to {high:.0f} %" for low, high in zip(lows, highs, strict=True)]
    memory = [row["ratio"] for row in records[1]["memory"][1:]]
    said.append(f"{min(ratios):.2f} to {max(ratios):.2f} times as fast")
    said.append(f"{min(memory):.2f} to {max(memory):.2f} of its memory")
    said.append(f"are {bench._show(records[1]['reconstructions'][1]['ratio'])} there")
    assert all(text in README for text in said), said


@pytest.mark.parametrize("name", ["bench", "bench-epyc"])
def test_compiling_takes_about_what_is_expected(name: str) -> None:
    record = json.loads((RESULTS.root / "tables" / f"{name}.json").read_text(encoding="utf-8"))
    for row in record["closures"]:
        network = network_of(measure.case(row["network"]))
        weights = {name: weight.detach() for name, weight in network.named_parameters()}
        assert 0.5 < expected_seconds(Leak(weights, {}, {})) / row["compile s"] < 2


def test_the_readme_is_short_and_its_pictures_exist() -> None:
    assert len(README.splitlines()) <= 150
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_the_readme_holds_its_two_commands() -> None:
    for name, end in (("run", "dlgbench run all"), ("tests", "python -m pytest")):
        (command,) = [line for line in block(name).splitlines() if line and not line.startswith("```")]
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert command.endswith(end)


def test_every_outcome_is_what_the_records_own_metrics_say() -> None:
    for record in records.load_all(RESULTS.records)[0].values():
        baselines = record.baselines.values()
        for index, image in enumerate(record.images):
            expected = tier(image, [rows[index] for rows in baselines], record.case.resolution)
            assert image["outcome"] == expected, record.case.id
        if record.images:
            worst = min((str(image["outcome"]) for image in record.images), key=TIERS.index)
            assert record.outcome == worst, record.case.id
