"""What an attack found, held against what the judge knows → a record and its pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from dlgbench.attacks.base import Attack, Reconstruction
from dlgbench.callbacks import Judge, to_uint8
from dlgbench.case import Case
from dlgbench.lineup import ranks
from dlgbench.metrics import TIERS, assign, convergence_step, judged, trivial
from dlgbench.records import Record, Status, finite

MATCHED = 1e-4
"""Below this relative squared gradient distance a gradient counts as matched."""


def score(
    case: Case, attack: Attack, judge: Judge, row: int, verdict: Status | None, others: Mapping[int, Tensor]
) -> Record:
    """The record of one row's trial, less cost and provenance; ``verdict`` is why it stopped early.

    ``others`` are what `lineup` gives for the case.
    """
    found, watched = attack.result, judge.cases[row]
    order = assign(found.images[row].clamp(0, 1), watched.images)
    bars = trivial(watched.images)
    ours = found.images[row][order]
    images: list[dict[str, Any]] = [*judged(ours, watched.images, bars)]
    labels = found.labels[row].argmax(-1)[order].tolist()
    for image, label, truth in zip(images, labels, watched.labels.tolist(), strict=True):
        image |= {"label": truth, "label_found": label}
    if others:
        for image, rank in zip(images, ranks(ours, watched.images, case, others), strict=True):
            image["rank"] = rank
    outcome = min((str(image["outcome"]) for image in images), key=TIERS.index)
    relative = finite(float(found.relative[row]))
    iterates = len(watched.history["mse"])  # less than the attack's where this row stopped before others
    objectives = [float(objective[row]) for objective in attack.trace]
    trace = [finite(value) for value in (*objectives[: iterates - 1], objectives[-1])]
    return Record(
        case=case, status=verdict or "done", outcome=outcome, images=tuple(images), baselines=bars,
        objective=finite(float(found.objective[row])), relative=relative,
        closures=int(attack.closures.view(-1, case.starts)[row // case.starts].sum()),
        flags=_flags(outcome, relative, verdict, watched.labels.tolist(), trace),
        history={"objective": trace, **watched.history},
        convergence_step=None if verdict or outcome == "failed" else convergence_step(watched.history["mse"]),
    )  # fmt: skip


def _flags(
    outcome: str, relative: float | None, verdict: str | None, labels: list[int], trace: list[float | None]
) -> tuple[str, ...]:
    tenth = trace[-1 - len(trace) // 10 :]
    found = {
        "matched-but-wrong": outcome == "failed" and relative is not None and relative < MATCHED,
        "diverged": verdict == "diverged",
        "stalled": len(tenth) > 1 and len(set(tenth)) == 1,
        "duplicate-labels": len(set(labels)) < len(labels),
    }
    return tuple(name for name, holds in found.items() if holds)


def finals(record: Record) -> dict[str, float]:
    """The final metrics in one number each, the mean over the batch; undefined ones are left out."""
    means = {
        name: [row[name] for row in record.images]
        for name in ("mse", "psnr", "ssim")
        if name in record.images[0]
    }
    finals: dict[str, float | None] = {name: sum(values) / len(values) for name, values in means.items()}
    finals |= {"objective": record.objective, "relative": record.relative}
    return {name: value for name, value in finals.items() if value is not None}


def pictures(judge: Judge, found: Reconstruction, row: int) -> bytes:
    """Arrays of 8-bit pixels ``(frame, image, height, width, channel)``; read without pickle."""
    watched, images = judge.cases[row], found.images[row]
    order = assign(images.clamp(0, 1), watched.images)
    file = io.BytesIO()
    np.savez_compressed(
        file, private=to_uint8(watched.images)[None], reconstruction=to_uint8(images[order])[None],
        evolution=np.stack(list(watched.frames.values())), steps=np.array(list(watched.frames)),
    )  # fmt: skip
    return file.getvalue()
