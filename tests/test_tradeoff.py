"""What defences prevent and cost: rows, recommendations and plots from records that are made up."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from scipy.stats import t as student

from dlgbench import cli, columns, exits, pareto, plots, recommend, render, tradeoff
from dlgbench.case import Case
from dlgbench.leaderboard import wilson
from dlgbench.records import Manifest, Record
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, Spec
from dlgbench.store import Store
from dlgbench.tradeoff import Rate, Tradeoff

from .clients import case

ATTACKED = case(dataset="digits", attack="spectral", channels=1, classes=10, dtype="float32", steps=20)
TRAINED = replace(ATTACKED, attack=ATTACKS.spec("none"), batch=32, steps=450)


def attacked(defense: str, attack: str, outcomes: list[str], **changes: Any) -> list[Record]:
    """A trial per outcome, the seed its place."""
    one = replace(ATTACKED, attack=ATTACKS.spec(attack), defense=DEFENSES.spec(defense), **changes)
    return [
        Record(
            case=replace(one, seed=seed),
            status="done",
            outcome=outcome,
            images=({"psnr": 30.0 if outcome == "exact" else 5.0, "label": 1, "label_found": 1},),
        )
        for seed, outcome in enumerate(outcomes)
    ]


def trained(defense: str, accuracies: list[float], milliseconds: float = 2.0, **changes: Any) -> list[Record]:
    one = replace(TRAINED, defense=DEFENSES.spec(defense))
    whole = {"update_seconds": milliseconds / 1000, "update_bytes": 400, "epsilon": None, "delta": None}
    return [
        Record(case=replace(one, seed=seed), status="done", utility={"accuracy": value, **whole, **changes})
        for seed, value in enumerate(accuracies)
    ]


def rows(*groups: list[Record], absent: tuple[Case, ...] = ()) -> list[Tradeoff]:
    records = [record for group in groups for record in group]
    manifest = Manifest("defenses", "t", "quick", (*(record.case for record in records), *absent))
    return tradeoff.table(manifest, {record.case.id: record for record in records})


SOME = (
    attacked("none", "spectral", ["exact"] * 20), attacked("none", "adaptive", ["exact"] * 19 + ["failed"]),
    trained("none", [0.90, 0.92, 0.94]),
    attacked("noise", "spectral", ["failed"] * 20),
    attacked("noise", "adaptive", ["exact"] * 5 + ["failed"] * 15),
    trained("noise", [0.88, 0.89, 0.93], 4.0),
    attacked("dpsgd", "spectral", ["failed"] * 20), attacked("dpsgd", "adaptive", ["failed"] * 20),
    trained("dpsgd", [0.60, 0.70, 0.65], 20.0, epsilon=2.5, delta=1e-5),
    attacked("prune", "spectral", ["failed"] * 20), attacked("prune", "adaptive", ["failed"] * 20),
    trained("prune", [0.899, 0.919, 0.939], 2.2, update_bytes=100),
    attacked("sign", "spectral", ["failed"] * 20), attacked("sign", "adaptive", ["failed"] * 20),
    trained("sign", [0.901, 0.921, 0.941], 2.1, update_bytes=12),
)  # fmt: skip


def by_name(found: list[Tradeoff]) -> dict[str, Tradeoff]:
    return {row.defense: row for row in found}


def test_records_made_before_an_option_existed_count_where_it_is_spelled_out() -> None:
    records = [*SOME[0], *SOME[2], *SOME[3], *SOME[5]]
    expected = rows(records)
    spelled = Manifest("defenses", "t", "quick", tuple(record.case for record in records))
    before = Spec("noise", (("std", 0.01),))
    some_noise = [r.case for r in records if r.case.defense.name == "noise" and r.case.seed < 2]
    old = [replace(r, case=replace(r.case, defense=before)) if r.case in some_noise else r for r in records]
    assert tradeoff.table(spelled, {record.case.id: record for record in old}) == expected


def test_a_defence_is_scored_by_the_stronger_attack_with_the_naive_one_beside_it() -> None:
    found = by_name(rows(*SOME))
    noise = found["noise"]
    assert noise.naive == Rate("spectral", 0, 20, wilson(0, 20), 0, None, 5.0)
    assert noise.adaptive == noise.strongest == Rate("adaptive", 5, 20, wilson(5, 20), 0, None, 5.0)
    whole = Rate("spectral", 20, 20, wilson(20, 20), 0, None, 30.0)
    assert found["none"].strongest == found["none"].naive == whole
    assert (found["none"].psnr, noise.psnr) == (30.0, 5.0)


def test_what_is_lost_is_paired_by_seed() -> None:
    noise = by_name(rows(*SOME))["noise"]
    lost = np.array([0.02, 0.03, 0.01])
    assert noise.accuracy == pytest.approx(0.9)
    assert noise.lost == pytest.approx(lost.mean())
    wanted = student.interval(0.95, 2, lost.mean(), lost.std(ddof=1) / np.sqrt(3))
    assert noise.lost_interval == pytest.approx(wanted)
    assert (noise.trainings, noise.update_bytes) == (3, 400)
    assert noise.slower == pytest.approx(2.0)
    alone = by_name(rows(*SOME[:2], trained("none", [0.9])))["none"]
    assert alone.lost_interval is None


def test_rows_go_from_the_safest_to_the_leakiest() -> None:
    found = [row.defense for row in rows(*SOME)]
    assert found == ["sign", "prune", "dpsgd", "noise", "none"]


def test_privacy_loss_is_told_where_there_is_one() -> None:
    found = by_name(rows(*SOME))
    assert (found["dpsgd"].epsilon, found["dpsgd"].delta) == (2.5, 1e-5)
    assert found["noise"].epsilon is None


def test_missing_trials_and_trainings_make_a_row_partial() -> None:
    missing = replace(SOME[4][0].case, seed=99)
    assert by_name(rows(*SOME, absent=(missing,)))["noise"].partial
    untrained = replace(SOME[5][0].case, seed=99)
    found = by_name(rows(*SOME, absent=(untrained,)))
    assert found["noise"].partial
    assert not found["prune"].partial


def test_what_was_skipped_says_why() -> None:
    skipped = [
        replace(record, status="skipped", reason="it needs | TenSEAL", utility={}) for record in SOME[8]
    ]
    row = by_name(rows(*SOME[:3], *SOME[6:8], skipped))["dpsgd"]
    assert (row.reason, row.accuracy, row.partial) == ("it needs | TenSEAL", None, False)
    assert r"it needs \| TenSEAL" in render.markdown("t", [row])


def test_what_broke_says_nothing_for_a_defence() -> None:
    broke = [replace(record, status="error", images=(), outcome="failed") for record in SOME[13][:3]]
    found = rows(*SOME[:13], broke + SOME[13][3:], SOME[14])
    assert by_name(found)["sign"].broken == 3
    assert "3 broken" in render.markdown("t", found)
    chosen = recommend.best(recommend.judged(found, 0.02, 0.2))
    assert chosen is not None
    assert chosen.defense == "prune"  # not sign, which is cheaper
    late = [replace(SOME[14][0], status="timeout"), *SOME[14][1:]]
    assert by_name(rows(*SOME[:14], late))["sign"].trainings == 2


def test_data_is_told_apart_by_its_options() -> None:
    source = replace(SOME[0][0].case, dataset=DATASETS.spec("samples:source=mnist"))
    found = rows(*SOME, [replace(SOME[0][0], case=source)])
    assert {row.dataset for row in found} == {"digits", "samples:source=mnist"}


def test_without_trainings_there_is_no_table() -> None:
    assert rows(SOME[0]) == []
    assert list(render.sheets(Manifest("a", "t", "quick", (SOME[0][0].case,)), {})) == [""]


def test_other_networks_batches_and_data_are_other_rows() -> None:
    batched = attacked("none", "spectral", ["exact"] * 3, batch=8)
    coarse = attacked("none", "spectral", ["exact"] * 3, resolution=16)
    found = rows(*SOME[:3], batched, coarse)
    assert sorted((row.batch, row.trials, row.accuracy is None) for row in found) == [
        (1, 3, True), (1, 43, False), (8, 6, False),
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["md", "csv", "tex", "json"])
def test_every_format_has_every_row(form: str) -> None:
    text = render.FORMATS[form]("Defences", rows(*SOME))
    for name in ("noise", "dpsgd", "sign"):
        assert name in text
    assert "2.5" in text
    if form == "json":
        assert json.loads(text)["rows"][3]["adaptive"]["recovered"] == 5
    if form == "csv":
        head, *lines = text.splitlines()
        assert {"naive_recovered", "adaptive_interval", "epsilon"} <= set(head.split(","))
        assert len(lines) == 5
        assert len({line.count(",") for line in (head, *lines)}) == 1


def test_a_terminal_shows_what_matters() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render.rich_table("Defences", rows(*SOME), 100))
    text = console.export_text()
    for title in ("defense", "naive", "adaptive", "lost", "5/20", "0/20"):
        assert title in text


def verdicts(most_lost: float = 0.02, most_recovered: float = 0.2) -> list[recommend.Verdict]:
    return recommend.judged(rows(*SOME), most_lost, most_recovered)


def test_the_cheapest_that_will_do_is_recommended() -> None:
    found = verdicts()
    assert [one.row.defense for one in found if one.will_do] == [
        "sign",
        "prune",
    ]  # a tie in time: fewer bytes
    chosen = recommend.best(found)
    assert chosen is not None
    assert chosen.defense == "sign"
    why = {one.row.defense: one.why for one in found}
    assert "recovered 5 of 20, which allows for 47%, more than 20%" in why["noise"]
    assert why["sign"].endswith("of the labels 100% were found")  # what is prevented is not all that leaks
    assert "costs at most 37.8% of accuracy, more than 2.0%" in why["dpsgd"]


def test_none_is_recommended_where_none_will_do() -> None:
    assert recommend.best(verdicts(most_recovered=0.1)) is None  # of 20 failures the bound is 16 %
    assert recommend.best(verdicts(most_lost=0.0)) is not None  # sign gains


def test_one_who_was_not_attacked_by_an_adaptive_attacker_is_not_trusted() -> None:
    found = recommend.judged(rows(*SOME[:3], SOME[12], SOME[14]), 0.5, 0.5)
    assert "not attacked by one who knows it" in {one.row.defense: one.why for one in found}["sign"]
    assert recommend.best(found) is None


def test_few_trials_of_the_weaker_attack_say_as_little_as_they_do() -> None:
    groups = [
        attacked("sign", "spectral", ["failed"] * 20),
        attacked("sign", "adaptive", ["failed"] * 4),
        trained("sign", [0.9, 0.9, 0.9]),
        trained("none", [0.9, 0.9, 0.9]),
    ]
    (found,) = recommend.judged(rows(*groups), 0.02, 0.2)
    assert not found.will_do
    assert found.why == "adaptive recovered 0 of 4, which allows for 49%, more than 20%"


def test_what_shows_in_part_is_told_and_scores() -> None:
    groups = [
        attacked("sign", "spectral", ["failed"] * 20),
        attacked("sign", "adaptive", ["partial"] * 15 + ["failed"] * 5),
        trained("sign", [0.9, 0.9, 0.9]),
        trained("none", [0.9, 0.9, 0.9]),
    ]
    (row,) = rows(*groups)
    assert row.strongest == row.adaptive
    (found,) = recommend.judged([row], 0.02, 0.2)
    assert found.why.startswith("adaptive recovered 0 of 20 and 15 in part, which allows for 16%; it costs")


def ranked(records: list[Record], ranks: list[int]) -> list[Record]:
    """The same, of which so many images of the dataset are at least as near, the private one included."""
    pairs = zip(records, ranks, strict=True)
    return [replace(r, images=({**r.images[0], "rank": rank},)) for r, rank in pairs]


def test_who_is_identified_is_told_beside_what_is_recovered() -> None:
    hidden = attacked("sign", "adaptive", ["partial"] * 3 + ["failed"])
    rest = [
        attacked("sign", "spectral", ["failed"] * 4),
        trained("sign", [0.9] * 3),
        trained("none", [0.9] * 3),
    ]
    (row,) = rows(ranked(hidden, [1, 1, 2, 900]), *rest)
    assert row.strongest
    assert row.strongest.identified == 2
    (found,) = recommend.judged([row], 0.02, 0.5)
    assert found.why.startswith(
        "adaptive recovered 0 of 4 and 3 in part (2 identified), which allows for 85%"
    )
    assert dict(zip(titles(row), columns.grid([row]).lines[0], strict=True))["identified"] == "2"


def test_a_defence_that_identifies_does_not_prevent_the_leak() -> None:
    groups = [trained("sign", [0.9] * 3), trained("none", [0.9] * 3)]
    hidden = attacked("sign", "adaptive", ["failed"] * 20), attacked("sign", "spectral", ["failed"] * 20)
    (row,) = rows(*(ranked(some, [500] * 20) for some in hidden), *groups)
    assert recommend.judged([row], 0.02, 0.2)[0].will_do
    (row,) = rows(ranked(hidden[0], [500] * 20), ranked(hidden[1], [1] * 5 + [2] * 15), *groups)
    (found,) = recommend.judged([row], 0.02, 0.2)
    assert not found.will_do
    assert found.why == "spectral recovered 0 of 20 (5 identified), which allows for 47%, more than 20%"


def test_who_is_identified_is_not_told_of_some_trials_only() -> None:
    old, new = attacked("sign", "adaptive", ["partial"] * 4), attacked("sign", "adaptive", ["partial"] * 4)
    mixed = [*ranked(new[:2], [1, 1]), *old[2:]]
    (row,) = rows(mixed, attacked("sign", "spectral", ["failed"] * 4), trained("sign", [0.9]))
    assert row.strongest
    assert row.strongest.identified is None
    assert "identified" not in titles(row)


def titles(row: Tradeoff) -> list[str]:
    return [column.title for column in columns.grid([row]).columns]


def test_trainings_of_the_same_seed_on_other_batches_all_count() -> None:
    groups = [attacked("none", "spectral", ["exact"]), trained("none", [0.9, 0.8])]
    again = [replace(record, case=replace(record.case, image=2)) for record in groups[1]]
    (row,) = rows(*groups, again)
    assert (row.trainings, row.lost) == (4, 0)


def test_a_defence_that_will_do_tells_what_leaks_where_it_is_seen_again() -> None:
    often = "noise:rounds=100,std=0.1"
    groups = [
        attacked("noise:std=0.1", "spectral", ["failed"] * 20),
        attacked("noise:std=0.1", "adaptive", ["failed"] * 20),
        trained("noise:std=0.1", [0.89, 0.91, 0.93]),
        attacked(often, "spectral", ["failed"] * 20),
        attacked(often, "adaptive", ["exact"] * 17 + ["failed"] * 3),
        trained(often, [0.89, 0.91, 0.93]),
    ]
    why = {one.row.defense: one.why for one in recommend.judged(rows(*SOME, *groups), 0.02, 0.2)}
    assert "; seen for 100 rounds, adaptive recovered 17 of 20" in why["noise:std=0.1"]
    assert "rounds" not in why["sign"] + why[often]


def stored(tmp_path: Path, *groups: list[Record]) -> Path:
    store = Store(tmp_path / "out")
    store.prepare()
    records = [record for group in groups for record in group]
    for record in records:
        store.put(record, b"")
    Manifest("defenses", "t", "quick", tuple(record.case for record in records)).save(store.plans)
    return store.root


def test_the_command_line_recommends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(stored(tmp_path, *SOME))
    assert cli.main(["recommend", "--out", out]) == exits.OK
    assert "lenet_dlg on digits at 32 px: sign" in capsys.readouterr().out
    assert cli.main(["recommend", "--out", out, "--max-recovery", "0.1"]) == exits.FAILED
    assert "no defence that was measured will do" in capsys.readouterr().out
    assert cli.main(["recommend", "--out", out, "--json"]) == exits.OK
    (group,) = json.loads(capsys.readouterr().out)
    assert group["recommended"] == {"defense": "sign", "batch": 1}
    assert len(group["verdicts"]) == 5


def test_of_two_runs_the_one_with_more_trials_counts(tmp_path: Path) -> None:
    root = stored(tmp_path, *SOME)
    few = [record.case for group in SOME for record in group if record.case.seed < 2]
    Manifest("defenses", "t", "standard", tuple(few)).save(Store(root).plans)
    found = recommend.measured(Store(root), None)
    assert sorted((row.defense, row.trials) for row in found) == sorted(
        (row.defense, row.trials) for row in rows(*SOME)
    )


@pytest.mark.parametrize("arguments", [["--network", "lenet6"], []])
def test_nothing_measured_is_an_error(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stored(tmp_path, *(SOME if arguments else ()))
    assert cli.main(["recommend", "--out", str(out), *arguments]) == exits.USAGE
    assert "dlgbench run defenses" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("share", ["2", "-0.1", "nan", "much"])
def test_a_share_is_between_nothing_and_all(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["recommend", "--max-recovery", share])
    assert "between 0 and 1" in capsys.readouterr().err


def point(rate: int, lost: float) -> Tradeoff:
    recovered = Rate("adaptive", rate, 10, (0.0, 1.0), 0, None, None)
    return Tradeoff("n", f"{rate} {lost}", "digits", 1, 32, adaptive=recovered, lost=lost)


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(-3, 60)), min_size=1, max_size=12))
def test_the_front_is_what_none_beats_in_both(points: list[tuple[int, int]]) -> None:
    every = [point(rate, lost / 100) for rate, lost in points]
    front = {(row.strongest.recovered, row.lost) for row in pareto.undominated(every) if row.strongest}
    for rate, lost in points:
        beaten = any(a <= rate and b <= lost and (a, b) != (rate, lost) for a, b in points)
        assert ((rate, lost / 100) not in front) == beaten
    costs = [row.lost for row in pareto.undominated(every)]
    assert costs == sorted(costs, key=lambda cost: cost or 0)


def test_every_defence_is_a_number_in_the_plot(tmp_path: Path) -> None:
    (path,) = plots.write_all(pareto.figures(rows(*SOME)), tmp_path)
    assert path.name == "pareto_lenet_dlg-on-digits-at-32-px.png"
    with Image.open(path) as image:
        assert image.width == plots.WIDTH
    ((_, figure),) = pareto.figures(rows(*SOME))
    told = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"1", "2", "3", "4", "5"} <= told
    assert any(text.startswith("noise  5/20, +2.0") for text in told)


def test_batches_are_drawn_apart_and_what_shows_in_part_is_told() -> None:
    groups = [attacked("sign", "adaptive", ["partial"] * 15 + ["failed"] * 5), trained("sign", [0.5, 0.6])]
    several = attacked("sign", "adaptive", ["failed"] * 20, batch=8)
    drawn = dict(pareto.figures(rows(*groups, several, trained("none", [0.5, 0.7]))))
    assert [name.partition("32-px")[2] for name in drawn] == ["", "-8-images-in-a-gradient"]
    told = [[text.get_text() for axes in one.axes for text in axes.texts] for one in drawn.values()]
    assert "sign  0/20 (+15), +5.0" in told[0]
    assert "sign  0/20, +5.0" in told[1]


def test_what_hides_more_is_not_beaten_by_what_shows_in_part() -> None:
    groups = [
        attacked("sign", "adaptive", ["partial"] * 15 + ["failed"] * 5), trained("sign", [0.9, 0.9]),
        attacked("dpsgd", "adaptive", ["failed"] * 20), trained("dpsgd", [0.5, 0.5]),
        attacked("noise", "adaptive", ["failed"] * 20), trained("noise", [0.4, 0.4]),
        trained("none", [0.9, 0.9]),
    ]  # fmt: skip
    assert [row.defense for row in pareto.undominated(rows(*groups))] == ["sign", "dpsgd"]


def test_numbers_lie_in_the_chart_and_cover_no_other() -> None:
    groups = [attacked(f"noise:std={n}", "adaptive", ["failed"] * 20) for n in range(1, 16)]
    costs = [trained(f"noise:std={n}", [0.1, 0.1]) for n in range(1, 16)]
    ((_, figure),) = pareto.figures(rows(*groups, *costs, trained("none", [0.95, 0.95])))
    (axes,) = [some for some in figure.axes if some.get_xlabel()]
    places = [axes.transData.transform(text.get_position()) for text in axes.texts]
    assert len(places) == 15
    assert all(axes.bbox.contains(*place) for place in places)
    assert min(np.hypot(*(a - b)) for a, b in itertools.combinations(places, 2)) >= pareto.ROOM - 1e-6


def test_what_was_not_measured_is_not_drawn() -> None:
    assert not list(pareto.figures(rows(SOME[0], SOME[1], trained("sign", [0.5, 0.6]))))


def test_a_run_of_both_ends_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "tiny.toml"
    plan.write_text(
        """
        [[grid]]
        network = ["lenet_dlg"]
        dataset = ["digits"]
        attack = ["idlg", "adaptive"]
        defense = ["none", "sign"]
        quick = { steps = 2 }
        [[grid]]
        network = ["lenet_dlg"]
        dataset = ["digits"]
        attack = ["none"]
        batch = [8]
        defense = ["none", "sign"]
        quick = { seeds = 2, steps = 3 }
        """
    )
    out = tmp_path / "out"
    assert cli.main(["run", str(plan), "--out", str(out), "--accelerator", "cpu"]) == exits.OK
    assert "and what does it cost?" in capsys.readouterr().out
    assert {path.suffix for path in (out / "tables").glob("*-costs.*")} == {".md", ".csv", ".tex", ".json"}
    assert len(list((out / "plots").rglob("pareto_lenet_dlg-on-digits-at-32-px.png"))) == 1
    assert cli.main(["run", str(plan), "--out", str(out)]) == exits.OK
    assert "0 trials computed, 8 were there" in capsys.readouterr().out
