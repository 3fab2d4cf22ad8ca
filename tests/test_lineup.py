"""Whether a reconstruction tells which of a dataset's images it is of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef

from dlgbench.case import Case
from dlgbench.datasets import Dataset, InMemory
from dlgbench.errors import UsageError
from dlgbench.lineup import FEWEST, lineup, ranks
from dlgbench.records import COMPARED
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.victims import secret_of

CASE = Case(
    network=NETWORKS.spec("lenet_dlg"), dataset=DATASETS.spec("digits"), attack=ATTACKS.spec("dlg"),
    defense=DEFENSES.spec("none"), batch=2, resolution=32, preparation="fit", channels=1, classes=10, steps=1,
    dtype="float32", image=3, seed=0,
)  # fmt: skip
PRIVATE = (6, 7)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    dataset: Dataset = DATASETS.make(CASE.dataset, None)
    return dataset


def rank_of(found: Tensor, truth: Tensor, digits: Dataset) -> list[int]:
    return ranks(found, truth, CASE, lineup(CASE, digits))


def test_a_blurred_pale_digit_is_still_identified(digits: Dataset) -> None:
    truth = secret_of(CASE, digits).images[0]
    pale = 0.4 + 0.1 * F.avg_pool2d(truth, 5, stride=1, padding=2)
    assert rank_of(pale, truth, digits) == [1, 1]


def test_the_rank_counts_all_that_are_nearer_by_torchmetrics(digits: Dataset) -> None:
    truth = secret_of(CASE, digits).images[0]
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
    for found in (noise, 0.1 * truth + 0.9 * noise):
        small, others = F.avg_pool2d(found, 4).flatten(1), lineup(CASE, digits)
        expected = []
        for ours, private in zip(small, PRIVATE, strict=True):
            near = {i: float(pearson_corrcoef(ours, image.flatten())) for i, image in others.items()}
            expected.append(sorted(near, key=near.__getitem__, reverse=True).index(private) + 1)
        assert rank_of(found, truth, digits) == expected
        assert max(expected) > 1  # else nothing was counted


@pytest.mark.parametrize("value", [0.0, 0.5, torch.nan])
def test_what_shows_nothing_identifies_nothing(value: float, digits: Dataset) -> None:
    truth = secret_of(CASE, digits).images[0]
    assert rank_of(torch.full_like(truth, value), truth, digits) == [COMPARED, COMPARED]


def test_batch_mates_are_among_the_others(digits: Dataset) -> None:
    truth = secret_of(CASE, digits).images[0]
    assert min(rank_of(truth.flip(0), truth, digits)) > 1


def test_nothing_is_asked_of_small_datasets() -> None:
    few = InMemory([(Image.new("L", (8, 8), index), 0) for index in range(FEWEST - 1)], 10, 1)
    assert lineup(CASE, few) == {}


def test_a_double_of_the_private_image_leaves_it_open(digits: Dataset) -> None:
    pairs = [(digits.image(index), 0) for index in range(FEWEST)]
    doubled = InMemory([*pairs, pairs[PRIVATE[0]]], 10, 1)
    truth = secret_of(CASE, doubled).images[0]
    assert ranks(truth, truth, CASE, lineup(CASE, doubled)) == [2, 1]


def test_what_cannot_be_read_is_left_out(digits: Dataset) -> None:
    class Torn(InMemory):
        def image(self, index: int) -> Image.Image:
            if index == 50:
                raise UsageError("torn")
            return super().image(index)

    torn = Torn([(digits.image(index), 0) for index in range(FEWEST + 1)], 10, 1)
    assert set(range(FEWEST + 1)) - lineup(CASE, torn).keys() == {50}
    assert lineup(CASE, replace(torn, pairs=torn.pairs[:FEWEST])) == {}  # one too few are left


def test_files_are_read_once_a_run(digits: Dataset) -> None:
    read: list[int] = []

    class Noted(InMemory):
        def image(self, index: int) -> Image.Image:
            read.append(index)
            return super().image(index)

    noted = Noted([(digits.image(index), 0) for index in range(FEWEST)], 10, 1)
    first, second = lineup(CASE, noted), lineup(replace(CASE, image=1, seed=5), noted)
    assert first is second
    assert read == list(range(FEWEST))
    assert {image.shape for image in lineup(replace(CASE, resolution=16), noted).values()} == {(1, 4, 4)}
