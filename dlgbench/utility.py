"""What a defence costs: a network trained with it, and tested → a record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlgbench import provenance
from dlgbench.case import Case, stream
from dlgbench.datasets import Dataset
from dlgbench.errors import UsageError
from dlgbench.records import Record, Status, finite
from dlgbench.registry import ATTACKS, DEFENSES
from dlgbench.training import accuracy
from dlgbench.victims import labelled, network_of

TESTED = 0.2
"""The share of the images that is not trained on."""
DELTA = 1e-5
"""The probability, at which ε is told, that differential privacy fails."""
Show = Callable[[int, float, float], None]
"""Told the step, the objective and the PSNR (dB, NaN where undefined) after every step: of several
cases, the medians."""


class Split(NamedTuple):
    """Images ``(image, channel, height, width)`` in [0, 1] and class indices, to train and to test on."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def run(
    cases: Sequence[Case], dataset: Dataset, device: torch.device, timeout: float, show: Show
) -> Iterator[Record]:
    """Train for cases that differ in seed and defence alone, one after another, and test each.

    Shown is how far all of them are together.
    """
    deadline = time.monotonic() + timeout
    images, labels = (part.to(device) for part in labelled(cases[0], dataset, range(len(dataset))))
    for index, case in enumerate(cases):

        def tell(step: int, before: int = index * case.steps) -> bool:
            show((before + step) // len(cases), math.nan, math.nan)
            return time.monotonic() < deadline

        yield _record(case, split(case, images, labels), tell)


def split(case: Case, images: Tensor, labels: Tensor) -> Split:
    """The images in an order of the case's seed, the last of them to test on."""
    generator = torch.Generator().manual_seed(stream(case, "split"))
    order = torch.randperm(len(images), generator=generator).to(images.device)
    train, test = torch.split(order, list(sizes(len(order))))
    return Split(images[train], labels[train], images[test], labels[test])


def sizes(images: int) -> tuple[int, int]:
    """On how many of so many images is trained, and on how many tested."""
    tested = round(TESTED * images)
    return images - tested, tested


def _record(case: Case, data: Split, tell: Callable[[int], bool]) -> Record:
    """``tell`` is told every step, and answers whether there is time for another."""
    device = data.images.device
    network, defense = network_of(case).to(device), DEFENSES.make(case.defense)
    generator = torch.Generator().manual_seed(stream(case, "training"))
    meter, clock, shared = provenance.Meter(device), [time.perf_counter()], dict[str, Tensor]()
    status: Status = "done"
    try:
        updates = ATTACKS.make(case.attack, network, *data[:2], defense, case.batch, generator)
        for step, shared in enumerate(islice(updates, case.steps), 1):  # noqa: B007 - the last is measured
            clock.append(time.perf_counter())
            if not tell(step):
                status = "timeout"
                break
    except UsageError:  # a gradient that is not finite: the network is what it is by then
        status = "diverged"
    epsilon = defense.epsilon(case.batch / len(data.images), case.steps, DELTA)
    told: dict[str, Any] = {
        "accuracy": accuracy(network, data.test_images, data.test_labels),
        "update_seconds": median(b - a for a, b in pairwise(clock)) if len(clock) > 1 else None,
        "update_bytes": defense.size(shared),
        "epsilon": None if epsilon is None else finite(epsilon),
        "delta": None if epsilon is None else DELTA,
    }
    whence = {**provenance.facts(device), "weights": "untrained at first", "images": len(data.images)}
    return Record(case=case, status=status, utility=told, cost=meter.stop(), provenance=whence)
