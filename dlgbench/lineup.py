"""Which of a dataset's images a reconstruction is of, for those who have the dataset to compare it with.

Image identifiability precision (Yin et al. 2021, "See through Gradients: Image Batch Recovery via
GradInversion"), by the correlation at a quarter of the resolution instead of a network's features.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dlgbench.case import Case
from dlgbench.datasets import Dataset, prepare
from dlgbench.errors import UsageError
from dlgbench.metrics import pearson, quarter
from dlgbench.records import COMPARED
from dlgbench.victims import indices

FEWEST = 100
"""Among fewer images it would say little."""


def lineup(case: Case, dataset: Dataset) -> Mapping[int, Tensor]:
    """Images ``(channel, height, width)`` of the dataset at a quarter of the case's resolution, by index.

    Without those that cannot be read; empty where there are too few.
    """
    return _lineup(dataset, case.resolution, case.preparation, case.channels)


@lru_cache(maxsize=4)
def _lineup(dataset: Dataset, *prepared: Any) -> Mapping[int, Tensor]:
    found = dict[int, Tensor]()
    for index in range(min(COMPARED, len(dataset)) if len(dataset) >= FEWEST else 0):
        with suppress(UsageError):  # of a file of the user's that is neither attacked nor trained on
            found[index] = quarter(prepare(dataset.image(index), *prepared)[None])[0]
    return found if len(found) >= FEWEST else {}


def ranks(found: Tensor, truth: Tensor, case: Case, others: Mapping[int, Tensor]) -> list[int]:
    """One more than how many ``others`` are as near to each of ``found`` as the private image it is of.

    Both are ``(image, channel, height, width)``, already assigned one to one.
    """
    return [
        _rank(ours, theirs, torch.stack([image for other, image in others.items() if other != index]))
        for index, ours, theirs in zip(indices(case), quarter(found), quarter(truth), strict=True)
    ]


def _rank(found: Tensor, truth: Tensor, others: Tensor) -> int:
    own = pearson(found[None], truth[None])
    behind = pearson(found[None], others.to(found)) < own  # not where either is no number
    return 1 + int((~behind).sum())
