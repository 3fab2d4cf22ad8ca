"""How near a reconstruction comes to the private images, and what that is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as ms_ssim,
)
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

SMALLEST_MSE = 1e-16
"""Errors below this are rounding, also in float64; it bounds PSNR at 160 dB, so that no value is infinite."""
SSIM_WINDOW, MS_SSIM_SMALLEST, MS_SSIM_UNPADDED = 11, 161, 176
ALIKE = {"ssim": 0.5, "pearson_quarter": 0.7}
"""From what on an image is recognisable, also of less than 20 dB; the second only from 128 px up."""
RECOGNISABLE_AT_QUARTER = 128
TIERS = ("failed", "partial", "recognisable", "exact")
Row = Mapping[str, float]
"""The metrics of one image by name."""


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for data range 1, at most 160."""
    return -10 * mse.clamp_min(SMALLEST_MSE).log10()


def assign(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """The one-to-one assignment of least total MSE: ``order`` with reconstruction[order[i]] for truth[i].

    Both are ``(image, channel, height, width)``; pairs with an undefined error are taken last.
    """
    errors = (truth.flatten(1)[:, None] - reconstruction.flatten(1)[None]).square().mean(-1)
    defined = errors.double().cpu()
    worst = 2 * len(truth) * defined[defined.isfinite()].max().item() + 1 if defined.isfinite().any() else 1.0
    finite = defined.nan_to_num(nan=worst, posinf=worst).numpy()
    return torch.as_tensor(linear_sum_assignment(finite)[1], device=truth.device)


class Fidelity(Metric):
    """Per-image fidelity to the truth of images that are already assigned one to one.

    ``update(reconstruction, truth)`` takes ``(image, channel, height, width)``; the truth lies in
    [0, 1] and the reconstruction is clamped to it.  ``compute`` returns one value per image for
    ``mse``, ``psnr`` (dB, data range 1), ``pearson``, ``pearson_quarter`` (after 4x4 mean pooling),
    ``psnr_affine`` (dB, after the best a x + b of the *unclamped* reconstruction, then clamped) and,
    where the images are large enough for their windows, ``ssim`` (11 px) and ``ms_ssim`` (161 px;
    below 176, which torchmetrics asks for, images are reflected at two borders to that size).
    ``only`` names those to compute, all by default.
    """

    full_state_update = False
    reconstruction: list[Tensor]
    truth: list[Tensor]

    def __init__(self, only: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.only = tuple(METRICS) if only is None else tuple(only)
        self.add_state("reconstruction", default=[], dist_reduce_fx="cat")
        self.add_state("truth", default=[], dist_reduce_fx="cat")

    def update(self, reconstruction: Tensor, truth: Tensor) -> None:
        self.reconstruction.append(reconstruction)
        self.truth.append(truth)

    def compute(self) -> dict[str, Tensor]:
        raw, truth = torch.cat(self.reconstruction), torch.cat(self.truth)
        measured = {name: METRICS[name] for name in self.only if truth.shape[-1] >= SMALLEST.get(name, 1)}
        return {name: metric(raw, truth) for name, metric in measured.items()}


def mean_squared_error(raw: Tensor, truth: Tensor) -> Tensor:
    """Of every image, clamped to [0, 1]."""
    return (raw.clamp(0, 1) - truth).square().flatten(1).mean(-1)


def pearson(ours: Tensor, truth: Tensor) -> Tensor:
    """Correlation over all pixels and channels of each image, in [-1, 1]; 0 where one is constant."""
    flat = [images.flatten(1) for images in (ours, truth)]
    a, b = (torch.where((x.amax(-1) > x.amin(-1))[:, None], x - x.mean(-1, keepdim=True), 0) for x in flat)
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 0, (a * b).sum(-1) / scale.clamp_min(torch.finfo(a.dtype).tiny), 0).clamp(
        -1, 1
    )


def quarter(raw: Tensor) -> Tensor:
    """Images clamped to [0, 1], the mean of every 4x4 pixels."""
    return F.avg_pool2d(raw.clamp(0, 1), min(raw.shape[-1], 4))


def psnr_affine(raw: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB after the affine map of pixel values, one gain and offset per image, of least MSE."""
    x, y = raw.flatten(1).double(), truth.flatten(1).double()
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    variance = dx.square().sum(-1)
    gain = torch.where(variance > 0, (dx * dy).sum(-1) / variance.clamp_min(1e-300), 0)
    mapped = (gain[:, None] * dx + y.mean(-1, keepdim=True)).clamp(0, 1)
    return psnr((mapped - y).square().mean(-1)).to(raw.dtype)


def fidelity(
    reconstruction: Tensor, truth: Tensor, only: Sequence[str] | None = None
) -> list[dict[str, float]]:
    """`Fidelity` of one batch as plain numbers, one mapping per image."""
    metric = Fidelity(only)
    metric.update(reconstruction.cpu(), truth.cpu())
    # compute() squeezes a single image's values to scalars
    columns = {name: values.reshape(-1).tolist() for name, values in metric.compute().items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def baselines(truth: Tensor) -> dict[str, Tensor]:
    """What needs no attack: mid grey, and each image's own mean colour (which an attacker lacks)."""
    mean = truth.mean((-2, -1), keepdim=True)
    return {"grey": torch.full_like(truth, 0.5), "mean_colour": mean.expand_as(truth)}


def trivial(truth: Tensor) -> dict[str, list[dict[str, float]]]:
    """The metrics of every trivial baseline, one mapping per image of ``truth``."""
    return {name: fidelity(images, truth) for name, images in baselines(truth).items()}


def tier(metrics: Row, bars: Sequence[Row], side: int) -> str:
    """The outcome of one image of ``side`` px, given the metrics of its trivial baselines, ``bars``.

    A metric counts only where it beats theirs: of a photo of the sky a uniform colour has an SSIM of 0.8.
    """
    best = {name: max(row.get(name, -math.inf) for row in bars) for name in metrics}
    better = metrics["psnr"] >= best["psnr"] + 1
    counted = ALIKE if side >= RECOGNISABLE_AT_QUARTER else ("ssim",)
    alike = any(metrics[n] >= ALIKE[n] and metrics[n] > best[n] for n in counted if n in metrics)
    if metrics["psnr"] >= 40:
        return "exact"
    if alike or (better and metrics["psnr"] >= 20):
        return "recognisable"
    return "partial" if better else "failed"


def judged(images: Tensor, truth: Tensor, bars: Mapping[str, Sequence[Row]]) -> list[dict[str, float | str]]:
    """The metrics and the ``outcome`` of images ``(image, channel, height, width)`` already assigned.

    ``bars`` are what `trivial` gives for the ``truth``.
    """
    rows = enumerate(fidelity(images, truth))
    side = truth.shape[-1]
    return [{**row, "outcome": tier(row, [some[i] for some in bars.values()], side)} for i, row in rows]


def convergence_step(mse: list[float | None]) -> int | None:
    """The first step from which the MSE stays within twice its final value.

    None where that says nothing: the start is already within it, or the final value is undefined.
    """
    final = mse[-1] if mse else None
    if final is None:
        return None
    outside = [step for step, value in enumerate(mse) if value is None or value > 2 * final]
    return outside[-1] + 1 if outside[:1] == [0] else None


def _structure(raw: Tensor, truth: Tensor) -> Tensor:
    return _vector(ssim(raw.clamp(0, 1), truth, data_range=1.0, reduction="none"))


def _structure_at_scales(raw: Tensor, truth: Tensor) -> Tensor:
    ours, theirs = _grown(raw.clamp(0, 1)), _grown(truth)
    return _vector(ms_ssim(ours, theirs, data_range=1.0, reduction="none", normalize="relu"))


def _pearson_quarter(raw: Tensor, truth: Tensor) -> Tensor:
    return pearson(quarter(raw), quarter(truth))


def _grown(images: Tensor) -> Tensor:
    missing = max(0, MS_SSIM_UNPADDED - images.shape[-1])
    return F.pad(images, (0, missing, 0, missing), mode="reflect")


def _vector(values: Tensor | tuple[Tensor, ...]) -> Tensor:
    assert isinstance(values, Tensor)
    return values.reshape(-1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mean_squared_error,
    "psnr": lambda raw, truth: psnr(mean_squared_error(raw, truth)),
    "pearson": lambda raw, truth: pearson(raw.clamp(0, 1), truth),
    "pearson_quarter": _pearson_quarter,
    "psnr_affine": psnr_affine,
    "ssim": _structure,
    "ms_ssim": _structure_at_scales,
}
SMALLEST = {"ssim": SSIM_WINDOW, "ms_ssim": MS_SSIM_SMALLEST}
"""The sides in px from which a metric is defined."""
