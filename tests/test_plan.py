"""Plans: which rows a file of grids and profiles means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dlgbench import grid
from dlgbench.plan import load
from dlgbench.registry import DATASETS

from .clients import case

TEXT = """
[[grid]]
network = ["lenet5", "resnet18:activation=relu"]
quick = { images = { default = 0, lenet5 = 2 }, steps = 7 }

[[grid]]
network = ["lenet5"]
batch = [8]

[quick]
seeds = 2
"""


def points(text: str, folder: Path, profile: str) -> list[tuple[object, ...]]:
    (folder / "mine.toml").write_text(text)
    rows = load(folder / "mine.toml").rows(profile)
    return [tuple(row[key] for key in ("network", "batch", "image", "seed", "steps")) for row in rows]


def test_every_grid_has_its_own_profiles_or_those_of_all(tmp_path: Path) -> None:
    assert points(TEXT, tmp_path, "quick") == [
        ("lenet5", 0, 0, 0, 7), ("lenet5", 0, 1, 0, 7), ("lenet5", 8, 0, 0, 300), ("lenet5", 8, 0, 1, 300),
    ]  # fmt: skip


def test_no_images_leave_a_network_out_of_one_profile_only(tmp_path: Path) -> None:
    networks = [row[0] for row in points(TEXT, tmp_path, "standard")]
    assert networks == ["lenet5", "resnet18:activation=relu", "lenet5"]


def test_files_in_another_class_are_another_case(tmp_path: Path) -> None:
    photos = DATASETS.make(DATASETS.spec("photos"), None)
    for place, index in (("a/1", 0), ("a/2", 1), ("b/3", 2)):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        photos.image(index).resize((32, 32)).save(tmp_path / f"{place}.png")

    def digests() -> list[str]:
        some = [case(dataset=f"folder:{tmp_path}", **more) for more in ({}, {"epochs": 1}, {"image": 2})]
        return [grid.Data(None).digest(one) for one in some]

    before = digests()
    assert len(set(before)) == 3
    (tmp_path / "a" / "2.png").rename(tmp_path / "b" / "2.png")
    moved = digests()
    assert [a == b for a, b in zip(before, moved, strict=True)] == [False, False, True]
    photos.image(3).resize((32, 32)).save(tmp_path / "b" / "4.png")  # it is only trained on
    assert [a == b for a, b in zip(moved, digests(), strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "ahead"),
    [
        ({"attack": "dlg"}, 0),
        ({"attack": "adaptive"}, 0),
        ({"attack": "spectral"}, 500),
        ({"attack": "spectral", "network": "lenet_dlg:activation=relu"}, 2000),
        ({"attack": "spectral", "network": "resnet18"}, 0),
        ({"attack": "spectral", "network": "resnet18:batchnorm=eval"}, 500),
        ({"attack": "spectral", "network": "inception_v3"}, 500),
    ],
)
def test_the_estimate_counts_what_comes_before_the_first_step(changes: Any, ahead: int) -> None:
    first, second = (grid.most_seconds(case(**changes, steps=steps)) for steps in (1, 2))
    assert first / (second - first) == pytest.approx((ahead + 25) / 25)  # torch: at most 1.25 times 20


def test_the_estimate_counts_the_iterations_of_a_step() -> None:
    usual, tenfold = (case(attack=f"spectral:iterations={count}", network="resnet18") for count in (20, 200))
    assert grid.most_seconds(tenfold) == pytest.approx(10 * grid.most_seconds(usual))
