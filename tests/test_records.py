"""Cases, their identity, and the files that hold what happened to them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlgbench import records
from dlgbench.case import Case, DType, stream
from dlgbench.errors import UsageError
from dlgbench.records import (
    Damaged,
    Manifest,
    Record,
    Status,
    decode,
    encode,
    load,
    load_all,
    manifests,
    save,
)
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, KINDS, NETWORKS, Registry, Spec

CASE = Case(
    network=NETWORKS.spec("resnet18:activation=relu"), dataset=DATASETS.spec("folder:/data/é, b=c"),
    attack=ATTACKS.complete("dlg", {"history": 7}), defense=DEFENSES.spec("noise:std=0.001"),
    batch=2, resolution=64, preparation="crop", channels=3, classes=10, steps=300, dtype="float32", image=4,
    seed=1,
)  # fmt: skip
IDENTITY = (  # the same case, as it is hashed
    '{"attack": {"history": 7, "iterations": 20, "learning_rate": 1.0, "name": "dlg", '
    '"tolerance_change": 1e-09, "tolerance_gradient": 1e-07}, "batch": 2, "channels": 3, '
    '"classes": 10, "data": "", '
    '"dataset": {"name": "folder", "path": "/data/\\u00e9, b=c"}, '
    '"defense": {"name": "noise", "std": 0.001}, "dtype": "float32", "image": 4, '
    '"network": {"activation": "relu", "batchnorm": "train", "init": "default", "name": "resnet18"}, '
    '"preparation": "crop", "resolution": 64, "seed": 1, "steps": 300}'
)
# Every field with another value: a new field must come here too, and it must change the identity.
OTHER: dict[str, Any] = {
    "network": NETWORKS.spec("resnet18:activation=tanh"), "dataset": DATASETS.spec("photos"),
    "attack": ATTACKS.spec("dlg"), "defense": DEFENSES.spec("none"), "batch": 1, "resolution": 65,
    "preparation": "fit", "channels": 1, "classes": 11, "steps": 301, "dtype": "float64", "image": 5,
    "seed": 0, "data": "0123456789abcdef", "epochs": 30, "starts": 4,
}  # fmt: skip
RECORD = Record(
    case=CASE, status="done", outcome="exact", reason="naïve “Grund”\n\t\"\\ \u2028 \U0001f984",
    flags=("diverged",),
    images=({"mse": 1e-300, "psnr": -0.0, "label": 3}, {"mse": 0.1, "ssim": None, "outcome": "exact"}),
    baselines={"grey": [{"mse": 0.25}, {"mse": 1 / 3}]}, objective=1.5e-7, relative=None, convergence_step=12,
    closures=6000, history={"objective": [1.0, None, 1e-12], "mse": []}, cost={"seconds": 1.25},
    provenance={"versions": {"torch": "2.15"}, "tf32": False},
)  # fmt: skip

TEXT = st.text(max_size=12)
FLOATS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = FLOATS | st.booleans() | st.integers(-(2**64), 2**64)
METRICS = st.dictionaries(TEXT, NUMBERS | TEXT, max_size=4)
JSON = st.recursive(
    NUMBERS | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6)  # fmt: skip
NESTED = st.dictionaries(TEXT, JSON, max_size=4)


def specs(registry: Registry) -> st.SearchStrategy[Spec]:
    floats = st.floats(allow_nan=False, allow_infinity=False)
    keys = st.text(min_size=1, max_size=8).filter(lambda key: key != "name")
    options = st.dictionaries(keys, st.text(max_size=8) | st.integers() | st.booleans() | floats, max_size=3)
    return st.builds(lambda name, given: Spec(name, tuple(sorted(given.items()))),
                     st.sampled_from(list(registry.entries)), options)  # fmt: skip


def cases() -> st.SearchStrategy[Case]:
    natural, positive = st.integers(0, 2**40), st.integers(1, 2**40)
    specs_of: dict[str, st.SearchStrategy[Any]] = {kind: specs(registry) for kind, registry in KINDS.items()}
    return st.builds(
        Case,
        **specs_of,
        batch=positive,
        resolution=positive,
        preparation=TEXT,
        channels=st.sampled_from([1, 3]),
        classes=positive,
        steps=positive,
        dtype=st.sampled_from(get_args(DType)),
        image=natural,
        seed=natural,
        data=TEXT,
        epochs=natural,
        starts=positive,
    )


def any_record() -> st.SearchStrategy[Record]:
    return st.builds(
        Record, case=cases(), status=st.sampled_from(get_args(Status)), reason=st.text(), outcome=TEXT,
        flags=st.lists(TEXT, max_size=3).map(tuple), images=st.lists(METRICS, max_size=3).map(tuple),
        baselines=st.dictionaries(TEXT, st.lists(METRICS, max_size=2), max_size=2), objective=FLOATS,
        relative=FLOATS, convergence_step=st.none() | st.integers(0), closures=st.integers(0),
        history=st.dictionaries(TEXT, st.lists(FLOATS, max_size=5), max_size=3), cost=NESTED,
        provenance=NESTED,
    )  # fmt: skip


# The codec


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_record())
def test_a_record_is_read_back_as_it_was(record: Record) -> None:
    text = encode(record)
    assert decode(text) == record
    assert encode(decode(text)) == text
    assert json.loads(text)["id"] == record.case.id


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    path = save(RECORD, tmp_path / "new" / "folder")
    assert (path.name, os.stat(path).st_mode & 0o777) == (f"{CASE.id}.json", 0o644)
    assert load(path) == RECORD
    assert decode(encode(RECORD)).images[0]["psnr"].hex() == (-0.0).hex()


def test_a_reason_with_bytes_that_are_no_text_is_saved(tmp_path: Path) -> None:
    """An error message may quote a file name that is not UTF-8, as Python tells it: with surrogates."""
    record = replace(RECORD, reason=f"no such file: {os.fsdecode(bytes([0x63, 0xE9, 0x2E]))}")
    assert load(save(record, tmp_path)) == record


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["objective", "images", "history", "cost"])
def test_numbers_that_json_has_no_word_for_are_refused(tmp_path: Path, number: float, place: str) -> None:
    values: dict[str, Any] = {
        "objective": number,
        "images": ({"mse": number},),
        "history": {"mse": [number]},
        "cost": {"deep": [{"er": number}]},
    }
    record = replace(RECORD, **{place: values[place]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(record, tmp_path)
    assert not list(tmp_path.iterdir())


def test_undefined_numbers_become_none() -> None:
    assert [records.finite(x) for x in (1.5, math.nan, math.inf, -math.inf)] == [1.5, None, None, None]


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_file_with_such_numbers_is_damaged(word: str) -> None:
    with pytest.raises(Damaged):
        decode(encode(RECORD).replace("1.5e-07", word))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "3",
        '"text"',
        "[" * 100_000,
        "{" * 100_000,
        '{"digest": 1}',
        '{"schema": [], "id": {}}',
        '{"digest": "", "schema": 1, "id": ""}',
        "9" * 5000,
        "\ufeff{}",
        "\x00",
    ],
)
def test_other_files_are_damaged(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(Damaged):
        load(file)


def forged(change: Callable[[dict[str, Any]], object]) -> str:
    """A record whose content was changed by someone who knows how to make the digest."""
    body = json.loads(encode(RECORD))
    change(body)
    del body["digest"]
    return json.dumps({"digest": records._digest(body), **body})


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(schema=2),
        lambda body: body.update(id="0" * 16),
        lambda body: body.update(status="fine"),
        lambda body: body.update(novelty=1),
        lambda body: body.pop("status"),
        lambda body: body.pop("flags"),
        lambda body: body.pop("case"),
        lambda body: body["case"].update(seed=2),
        lambda body: body["case"].pop("seed"),
        lambda body: body["case"].update(seed="1"),
        lambda body: body["case"].update(seed=-1),
        lambda body: body["case"].update(novelty=1),
        lambda body: body["case"].update(network="resnet18"),
        lambda body: body["case"]["network"].pop("name"),
        lambda body: body.update(case=None),
        lambda body: body.update(images=None),
        lambda body: body.update(status=None),
    ],
)
def test_a_forged_record_is_damaged(change: Callable[[dict[str, Any]], object]) -> None:
    assert decode(forged(lambda body: None)) == RECORD
    with pytest.raises(Damaged):
        decode(forged(change))


POSITIONS = st.integers(0, len(encode(RECORD).encode()) - 1)
JSONS = [bytes([sign]) for sign in b'0123456789eE+-."{}[]:, \n']
LETTERS = st.binary(min_size=1, max_size=1) | st.sampled_from(JSONS)


@settings(max_examples=400, deadline=None)
@given(position=POSITIONS, letter=LETTERS, kind=st.sampled_from(["change", "insert", "delete", "cut"]))
def test_a_damaged_file_says_so_or_says_the_same(
    tmp_path_factory: pytest.TempPathFactory, position: int, letter: bytes, kind: str
) -> None:
    content = encode(RECORD).encode()
    tail = {
        "change": letter + content[position + 1 :],
        "insert": letter + content[position:],
        "delete": content[position + 1 :],
        "cut": b"",
    }
    file = tmp_path_factory.getbasetemp() / f"{CASE.id}.json"
    file.write_bytes(content[:position] + tail[kind])
    try:
        found = load(file)
    except Damaged:
        return
    assert found == RECORD
    assert kind != "cut" or position == len(content) - 1


@pytest.mark.parametrize("name", ["0123456789abcdef.json", f"{CASE.id}x.json", f"copy of {CASE.id}.json"])
def test_a_record_under_another_name_is_damaged(tmp_path: Path, name: str) -> None:
    save(RECORD, tmp_path).rename(tmp_path / name)
    with pytest.raises(Damaged, match=CASE.id):
        load(tmp_path / name)


def test_a_folder_gives_its_sound_records_and_names_the_damaged(tmp_path: Path) -> None:
    other = replace(RECORD, case=replace(CASE, seed=9))
    save(RECORD, tmp_path)
    bad = save(other, tmp_path)
    bad.write_text(bad.read_text().replace("exact", "eaxct"))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / f".{CASE.id}.json.tmp").write_text("half")
    (tmp_path / "readme.txt").write_text("passed over")
    sound, damaged = load_all(tmp_path)
    assert sound == {CASE.id: RECORD}
    assert set(damaged) == {bad, tmp_path / "folder.json"}
    assert all(damaged.values())
    assert load_all(tmp_path, [CASE.id, "0" * 16]) == ({CASE.id: RECORD}, {})
    assert load_all(tmp_path / "none") == ({}, {})


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["replace", "fsync", "chmod"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = save(RECORD, tmp_path)
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        save(replace(RECORD, closures=1), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert load(path) == RECORD


def test_a_file_appears_only_when_it_is_whole_and_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            if name == "replace":
                assert Path(arguments[0]).read_bytes() == encode(RECORD).encode()
                assert Path(arguments[0]).parent == Path(arguments[1]).parent
            return real(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, spy(name))
    save(RECORD, tmp_path)
    assert calls[:2] == ["fsync", "replace"]


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    save(RECORD, tmp_path)
    newer = replace(RECORD, status="timeout", reason="")
    assert load(save(newer, tmp_path)) == newer
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("status", "broken"),
    [
        ("done", False),
        ("diverged", False),
        ("skipped", False),
        ("timeout", True),
        ("oom", True),
        ("error", True),
    ],
)
def test_a_result_is_not_broken(status: Status, broken: bool) -> None:
    assert Record(case=CASE, status=status).broken is broken
    assert set(get_args(Status)) == {"done", "diverged", "skipped", "timeout", "oom", "error"}


# Manifests


def test_manifests_are_read_back(tmp_path: Path) -> None:
    one = Manifest("plan", "A “title”", "quick", (CASE, replace(CASE, seed=2)))
    other = replace(one, cases=one.cases[:1])
    for manifest in (one, other):
        manifest.save(tmp_path)
    assert sorted(manifests(tmp_path), key=lambda m: -len(m.cases)) == [one, other]
    assert one.ids == [case.id for case in one.cases]
    assert one.name != other.name
    assert one.name.startswith("plan-quick-")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"cases": 3}', '{"cases": [{}]}', '{"cases": [], "a": 1}', "[" * 100_000],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=r"a\.json"):
        manifests(tmp_path)


# Identity


def test_the_identity_is_a_known_answer() -> None:
    """Changed? Then every record in the world is orphaned: raise PROTOCOL and say so in CHANGELOG.md."""
    assert CASE.id == hashlib.sha256(f"[3, {IDENTITY}]".encode()).hexdigest()[:16] == "16fb75a18f7b9bb8"


@pytest.mark.parametrize(
    ("revision", "content"),
    [
        (2, f"[3, {IDENTITY}, 2]"),
        ({"default": 1, "network.batchnorm=train": 2}, f"[3, {IDENTITY}, 2]"),
        ({"default": 1, "network.batchnorm=eval": 2}, f"[3, {IDENTITY}, 1]"),
        ({"default": 1, "network=lenet_dlg": 2}, f"[3, {IDENTITY}, 1]"),
        ({"network=lenet_dlg": 2}, f"[3, {IDENTITY}]"),
        ({"default": 1, "network=resnet18,network.batchnorm=train": 2}, f"[3, {IDENTITY}, 2]"),
        ({"default": 1, "network=resnet18,network.batchnorm=eval": 2}, f"[3, {IDENTITY}, 1]"),
    ],
)
def test_an_attacks_revision_for_such_a_case_is_part_of_the_identity(
    revision: object, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    revised = replace(ATTACKS.entry("dlg"), facts={**ATTACKS.entry("dlg").facts, "revision": revision})
    monkeypatch.setitem(ATTACKS.entries, "dlg", revised)
    assert (CASE.network.name, CASE.get("network.batchnorm")) == ("resnet18", "train")
    assert CASE.id == hashlib.sha256(content.encode()).hexdigest()[:16]


def test_an_option_that_came_later_changes_the_identity_where_it_is_used() -> None:
    noise = replace(CASE, defense=DEFENSES.spec("noise:std=0.5"))
    before = replace(CASE, defense=Spec("noise", (("std", 0.5),)))
    assert noise.id == before.id != replace(CASE, defense=DEFENSES.spec("noise:std=0.5,rounds=2")).id


def test_records_of_attacks_that_this_version_does_not_know_can_be_read(tmp_path: Path) -> None:
    stranger = replace(RECORD, case=replace(CASE, attack=Spec("of_the_future", (("depth", 3),))))
    assert load(save(stranger, tmp_path)) == stranger


def test_every_field_is_part_of_the_identity() -> None:
    assert set(OTHER) == {field.name for field in fields(Case)}
    variants = [CASE, *(replace(CASE, **{name: value}) for name, value in OTHER.items())]
    assert len({case.id for case in variants}) == len(variants)
    assert all(len(case.id) == 16 and set(case.id) <= set("0123456789abcdef") for case in variants)


@settings(max_examples=100, deadline=None)
@given(one=cases(), other=cases(), names=st.sets(st.sampled_from(sorted(OTHER))))
def test_ids_are_equal_exactly_when_cases_are(one: Case, other: Case, names: set[str]) -> None:
    mixed = replace(one, **{name: getattr(other, name) for name in names})
    assert (mixed.id == one.id) == (mixed.plain() == one.plain())
    assert replace(one).id == one.id


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_case_is_read_back_from_plain_values(case: Case) -> None:
    again = Case.from_plain(json.loads(json.dumps(case.plain())))
    assert again == case
    assert again.id == case.id


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("batch", "resolution", "classes", "steps")),
        *((name, -1) for name in ("batch", "image", "seed")),
        *(("dtype", name) for name in ("float16", "flaot64", "")),
    ],
)
def test_a_case_out_of_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field) as caught:
        replace(CASE, **{field: value})
    assert "expected" in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "1"},
        {"seed": 1.0},
        {"seed": True},
        {"seed": None},
        {"dtype": 32},
        {"preparation": 1},
        {"network": "a"},
        {"network": {}},
        {"network": None},
        {"novelty": 1},
        {"steps": -3},
        {"dtype": "float8"},
    ],
)
def test_plain_values_of_another_kind_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError, KeyError)):
        Case.from_plain({**CASE.plain(), **change})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("network", "resnet18"),
        ("network.activation", "relu"),
        ("network.dropout", None),
        ("seed", 1),
        ("attack.history", 7),
        ("defense.std", 0.001),
        ("dtype", "float32"),
        ("dataset.path", "/data/é, b=c"),
    ],
)
def test_a_field_is_got_by_its_path(path: str, value: object) -> None:
    assert CASE.get(path) == value


@pytest.mark.parametrize("path", ["seeds", "netwrok", "shape", "id", ""])
def test_an_unknown_field_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match=f"unknown field '{path}'"):
        CASE.get(path)


# Streams


def test_streams_differ_by_purpose_seed_and_image() -> None:
    found = {
        stream(replace(CASE, seed=seed, image=image), purpose)
        for seed in range(12)
        for image in range(12)
        for purpose in ("weights", "attack", "labels", "defense")
    }
    assert len(found) == 12 * 12 * 4
    assert all(0 <= seed < 2**63 for seed in found)
    middle = sum(found) / len(found) / 2**63
    assert middle == pytest.approx(0.5, abs=4 / (12 * len(found)) ** 0.5)


@pytest.mark.parametrize("field", sorted(set(OTHER) - {"seed", "image"}))
def test_a_stream_is_the_same_for_paired_cases(field: str) -> None:
    other = replace(CASE, **{field: OTHER[field]})
    for purpose in ("weights", "attack"):
        assert stream(other, purpose) == stream(CASE, purpose)


def test_a_stream_is_a_known_answer() -> None:
    digest = hashlib.sha256(b"1/4/weights").hexdigest()
    assert stream(CASE, "weights") == int(digest[:16], 16) // 2 == 3478831339142009665
