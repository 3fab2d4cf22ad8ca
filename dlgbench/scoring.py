"""What an attack found, held against what the judge knows → a record and its pictures."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from dlgbench.attacks.base import Attack, Reconstruction
from dlgbench.callbacks import Judge, to_uint8
from dlgbench.case import Case
from dlgbench.metrics import TIERS, assign, baselines, convergence_step, fidelity, tier
from dlgbench.records import Record, Status, finite

MATCHED = 1e-4
"""Below this relative squared gradient distance a gradient counts as matched."""


def score(case: Case, attack: Attack, judge: Judge, verdict: Status | None) -> Record:
    """The record of a trial that ran, less its cost and provenance; ``verdict`` is why it stopped early."""
    found = attack.result
    order = assign(found.images[0].clamp(0, 1), judge.images)
    images: list[dict[str, Any]] = [*fidelity(found.images[0][order], judge.images)]
    trivial = {name: fidelity(picture, judge.images) for name, picture in baselines(judge.images).items()}
    labels = found.labels[0].argmax(-1)[order].tolist()
    for index, (image, label, truth) in enumerate(zip(images, labels, judge.labels.tolist(), strict=True)):
        bar = max(rows[index]["psnr"] for rows in trivial.values())
        image |= {"outcome": tier(image, bar, case.resolution), "label": truth, "label_found": label}
    outcome = min((str(image["outcome"]) for image in images), key=TIERS.index)
    relative = finite(float(found.relative[0]))
    trace = [finite(float(objective[0])) for objective in attack.trace]
    return Record(
        case=case, status=verdict or "done", outcome=outcome, images=tuple(images), baselines=trivial,
        objective=finite(float(found.objective[0])), relative=relative, closures=attack.closures,
        flags=_flags(outcome, relative, verdict, judge.labels.tolist(), trace),
        history={"objective": trace, **judge.history},
        convergence_step=None if verdict or outcome == "failed" else convergence_step(judge.history["mse"]),
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


def pictures(judge: Judge, found: Reconstruction) -> bytes:
    """Arrays of 8-bit pixels ``(frame, image, height, width, channel)``; read without pickle."""
    order = assign(found.images[0].clamp(0, 1), judge.images)
    file = io.BytesIO()
    np.savez_compressed(
        file, private=to_uint8(judge.images)[None], reconstruction=to_uint8(found.images[0][order])[None],
        evolution=np.stack(list(judge.frames.values())), steps=np.array(list(judge.frames)),
    )  # fmt: skip
    return file.getvalue()
