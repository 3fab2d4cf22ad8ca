"""The metrics against scikit-image, numpy, scipy and brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage import metrics as scikit
from torch import Tensor

from dlgbench.images import prepare
from dlgbench.metrics import (
    MS_SSIM_SMALLEST,
    TIERS,
    Fidelity,
    assign,
    baselines,
    convergence_step,
    fidelity,
    pearson,
    psnr,
    psnr_affine,
    tier,
)
from dlgbench.registry import DATASETS

SCIKIT: Any = scikit  # it has no annotations
Array = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32)


def images(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Smooth pictures in [0, 1] with noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*shape[:-2], 4, 4, generator=generator, dtype=dtype)
    smooth = torch.nn.functional.interpolate(coarse, shape[-2:], mode="bilinear")
    return (smooth + 0.1 * torch.randn(shape, generator=generator, dtype=dtype)).clamp(0, 1)


def pair(
    shape: tuple[int, ...], noise: float = 0.2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A reconstruction that leaves [0, 1] in places, and the truth."""
    truth = images(shape, seed, dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    return truth + noise * torch.randn(shape, generator=generator, dtype=dtype), truth


def array(image: Tensor) -> Array:
    """``(height, width, channel)``."""
    values: Array = image.double().permute(1, 2, 0).numpy()
    return values


def mirrored(image: Array) -> Array:
    """With the border that torchmetrics adds and scikit-image leaves out of its mean."""
    return np.pad(image, ((5, 5), (5, 5), (0, 0))[: image.ndim], mode="reflect")


# One image against other libraries


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 28, 28), (3, 3, 11, 11), (1, 3, 64, 64)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_mse_psnr_and_ssim_are_scikit_images(shape: tuple[int, ...], noise: float) -> None:
    raw, truth = pair(shape, noise)
    for found, ours, theirs in zip(fidelity(raw, truth), raw.clamp(0, 1), truth, strict=True):
        a, b = array(ours), array(theirs)
        assert found["mse"] == pytest.approx(SCIKIT.mean_squared_error(a, b), rel=1e-9)
        assert found["psnr"] == pytest.approx(SCIKIT.peak_signal_noise_ratio(b, a, data_range=1), rel=1e-9)
        similarity = SCIKIT.structural_similarity(
            mirrored(a), mirrored(b), gaussian_weights=True, sigma=1.5, data_range=1,
            use_sample_covariance=False, channel_axis=-1)  # fmt: skip
        assert found["ssim"] == pytest.approx(float(similarity), abs=1e-5)


def contrast(a: Array, b: Array) -> tuple[float, float]:
    """SSIM and its contrast-structure part for one channel (Wang et al. 2004, equations 12 and 13)."""

    def blur(x: Array) -> Array:
        blurred: Array = gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]
        return blurred

    mean_a, mean_b = blur(a), blur(b)
    structure = (2 * (blur(a * b) - mean_a * mean_b) + 9e-4) / (
        blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2 + 9e-4
    )
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return float((luminance * structure).mean()), float(structure.mean())


def multi_scale(a: Array, b: Array) -> float:
    """MS-SSIM for one channel (Wang et al. 2003, equation 7), with the border at the coarsest scale."""
    result = 1.0
    for weight in (0.0448, 0.2856, 0.3001, 0.2363):
        result *= max(contrast(a, b)[1], 0) ** weight
        a, b = (
            x[: len(x) // 2 * 2, : len(x) // 2 * 2].reshape(len(x) // 2, 2, len(x) // 2, 2).mean((1, 3))
            for x in (a, b)
        )
    return float(result * max(contrast(mirrored(a), mirrored(b))[0], 0) ** 0.1333)


@pytest.mark.parametrize(("side", "noise"), [(176, 0.1), (193, 0.5), (224, 0.02)])
def test_ms_ssim_is_the_papers(side: int, noise: float) -> None:
    raw, truth = pair((1, 1, side, side), noise)
    expected = multi_scale(raw.clamp(0, 1)[0, 0].numpy(), truth[0, 0].numpy())
    assert fidelity(raw, truth)[0]["ms_ssim"] == pytest.approx(expected, abs=1e-4)


def quarters(image: Tensor) -> Array:
    channels, side, _ = image.shape
    cut = image[:, : side // 4 * 4, : side // 4 * 4]
    blocks: Array = cut.reshape(channels, side // 4, 4, side // 4, 4).mean((2, 4)).numpy()
    return blocks


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 30, 30), (1, 3, 8, 8)])
def test_correlations_are_numpys(shape: tuple[int, ...]) -> None:
    raw, truth = pair(shape)
    for found, ours, theirs in zip(fidelity(raw, truth), raw.clamp(0, 1), truth, strict=True):
        full = np.corrcoef(ours.flatten().numpy(), theirs.flatten().numpy())[0, 1]
        coarse = np.corrcoef(quarters(ours).ravel(), quarters(theirs).ravel())[0, 1]
        assert found["pearson"] == pytest.approx(full, abs=1e-12)
        assert found["pearson_quarter"] == pytest.approx(coarse, abs=1e-12)


@pytest.mark.parametrize(("gain", "offset"), [(1, 0), (40, -7), (-0.3, 0.8), (1e-3, 5), (1e4, 1e4)])
def test_the_affine_map_is_numpys_best_line(gain: float, offset: float) -> None:
    raw, truth = pair((2, 3, 16, 16))
    raw = gain * raw + offset
    for found, ours, theirs in zip(fidelity(raw, truth), raw, truth, strict=True):
        x, y = ours.flatten().numpy(), theirs.flatten().numpy()
        slope, intercept = np.polyfit(x, y, 1)
        error = np.mean((np.clip(slope * x + intercept, 0, 1) - y) ** 2)
        assert found["psnr_affine"] == pytest.approx(-10 * np.log10(error), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, gain=st.floats(0.01, 100), offset=st.floats(-10, 10), sign=st.sampled_from([-1, 1]))
def test_an_affine_change_does_not_matter_to_the_affine_psnr(
    seed: int, gain: float, offset: float, sign: int
) -> None:
    raw, truth = pair((2, 1, 12, 12), seed=seed)
    torch.testing.assert_close(
        psnr_affine(sign * gain * raw + offset, truth), psnr_affine(raw, truth), rtol=0, atol=1e-6
    )
    exact = psnr_affine(sign * gain * truth + offset, truth)
    assert (exact > 120).all()


# Edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [4, 10, 11, 32, 161])
def test_identical_images_are_perfect_and_finite(side: int, dtype: torch.dtype) -> None:
    truth = images((1, 3, side, side), dtype=dtype)
    (found,) = fidelity(truth, truth)
    assert (found["mse"], found["psnr"]) == (0, 160)
    assert found["psnr_affine"] >= (120 if dtype == torch.float32 else 159.9)
    for name in {"pearson", "ssim", "ms_ssim"} & set(found):
        assert found[name] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_psnr_is_bounded_and_monotone(dtype: torch.dtype) -> None:
    errors = torch.tensor([0, torch.finfo(dtype).tiny, 1e-16, 1e-15, 1e-4, 1], dtype=dtype)
    assert psnr(errors).tolist() == pytest.approx([160, 160, 160, 150, 40, 0], abs=1e-4)
    assert psnr(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("side", [4, 8, 10, 11, 12, 160, 161, 175, 176])
@pytest.mark.parametrize(("count", "channels"), [(1, 1), (2, 3)])
def test_sizes_have_the_metrics_that_fit(side: int, count: int, channels: int) -> None:
    names = {"mse", "psnr", "pearson", "pearson_quarter", "psnr_affine"}
    names |= {"ssim"} if side >= 11 else set()
    names |= {"ms_ssim"} if side >= MS_SSIM_SMALLEST else set()
    found = fidelity(*pair((count, channels, side, side)))
    assert len(found) == count
    for row in found:
        assert set(row) == names
        assert all(type(value) is float and math.isfinite(value) for value in row.values())


def test_large_images_have_a_multi_scale_similarity() -> None:
    assert MS_SSIM_SMALLEST == 161  # what the benchmark promises


@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_smallest_images_do_not_crash(side: int) -> None:
    for row in fidelity(*pair((2, 3, side, side))):
        assert math.isfinite(row["mse"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(value=st.floats(0, 1), other=st.floats(0, 1), side=st.sampled_from([4, 12, 33]))
def test_constant_images_have_no_correlation(
    dtype: torch.dtype, value: float, other: float, side: int
) -> None:
    shape = (1, 3, side, side)
    flat, flat_too, picture = (
        torch.full(shape, value, dtype=dtype),
        torch.full(shape, other, dtype=dtype),
        images(shape, dtype=dtype),
    )
    for ours, theirs in ((flat, flat_too), (flat, picture), (picture, flat)):
        (found,) = fidelity(ours, theirs)
        assert all(math.isfinite(number) for number in found.values())
        assert found["pearson"] == pytest.approx(0, abs=1e-3)
        assert found["pearson_quarter"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.float64, 1e30), (torch.float64, 1e200)]
)
def test_a_reconstruction_that_blew_up_has_finite_metrics(dtype: torch.dtype, size: float) -> None:
    raw, truth = pair((2, 3, 16, 16), dtype=dtype)
    for row in fidelity((raw - 0.5) * size, truth):
        assert all(math.isfinite(value) for value in row.values()), row


def test_an_undefined_reconstruction_is_undefined_and_leaves_its_neighbour_alone() -> None:
    raw, truth = pair((2, 3, 16, 16))
    alone = fidelity(raw[1:], truth[1:])[0]
    raw[0, 1, 2, 3] = math.nan
    first, second = fidelity(raw, truth)
    assert math.isnan(first["mse"])
    assert math.isnan(first["psnr"])
    assert second == pytest.approx(alone, rel=1e-9)


# Many images


def by_image(columns: list[dict[str, float]], order: list[int]) -> list[dict[str, float]]:
    return [columns[index] for index in order]


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, order=st.permutations(range(4)))
def test_permuting_both_permutes_the_metrics(seed: int, order: list[int]) -> None:
    raw, truth = pair((4, 3, 12, 12), seed=seed)
    permuted = fidelity(raw[list(order)], truth[list(order)])
    for ours, theirs in zip(permuted, by_image(fidelity(raw, truth), order), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("side", [12, 176])
def test_a_batch_is_its_images_one_by_one(side: int) -> None:
    raw, truth = pair((3, 3, side, side))
    alone = [fidelity(raw[i : i + 1], truth[i : i + 1])[0] for i in range(3)]
    for ours, theirs in zip(fidelity(raw, truth), alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_updates_accumulate_and_reset_forgets() -> None:
    raw, truth = pair((3, 3, 12, 12))
    metric = Fidelity()
    metric.update(raw[:2], truth[:2])
    metric.update(raw[2:], truth[2:])
    together = metric.compute()
    metric.reset()
    metric.update(raw, truth)
    assert set(together) == set(metric.compute())
    assert all(torch.equal(together[name], values) for name, values in metric.compute().items())


@settings(max_examples=150, deadline=None)
@given(count=st.integers(1, 5), seed=SEEDS, data=st.data())
def test_the_assignment_is_the_best_of_all(count: int, seed: int, data: st.DataObject) -> None:
    broken = data.draw(st.sets(st.integers(0, count - 1)))
    check_assignment(count, seed, broken, math.nan)


@pytest.mark.parametrize("broken", [set(), {0}, {1, 2}, {0, 1, 2, 3}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_undefined_image_leaves_the_others_their_best(broken: set[int], value: float) -> None:
    for seed in range(20):
        check_assignment(4, seed, broken, value)


def check_assignment(count: int, seed: int, broken: set[int], value: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, truth = (torch.rand(count, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    for index in broken:
        ours[index, 0, 0, 1] = value
    order = assign(ours, truth).tolist()
    assert sorted(order) == list(range(count))
    errors = (truth[:, None] - ours[None]).square().mean((2, 3, 4)).numpy()
    best = min(total(errors, list(permutation)) for permutation in itertools.permutations(range(count)))
    assert total(errors, order) == pytest.approx(best, rel=1e-9)


def total(errors: Any, order: list[int]) -> float:
    """The error of all pairs in which it is defined."""
    return float(sum(error for i, j in enumerate(order) if math.isfinite(error := errors[i, j])))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_shuffled_batch_is_put_right(order: tuple[int, ...]) -> None:
    raw, truth = pair((3, 3, 8, 8), noise=0.01, dtype=torch.float32)
    shuffled = raw[list(order)]
    assert torch.equal(shuffled[assign(shuffled, truth)], raw)


# What it is called


def test_baselines_are_grey_and_the_best_constant_colour() -> None:
    truth = images((2, 3, 9, 9))
    found = baselines(truth)
    assert set(found) == {"grey", "mean_colour"}
    assert (found["grey"] == 0.5).all()
    assert found["grey"].shape == found["mean_colour"].shape == truth.shape
    spread = truth.numpy().var((2, 3)).mean(1)  # the variance is the least error of a constant
    errors = [row["mse"] for row in fidelity(found["mean_colour"], truth)]
    assert errors == pytest.approx(spread.tolist(), rel=1e-9)


def metrics(**values: float) -> dict[str, float]:
    return {"psnr": 5.0, "ssim": 0.1, "pearson_quarter": 0.1, **values}


def below(value: float) -> float:
    return math.nextafter(value, -math.inf)


@pytest.mark.parametrize(
    ("values", "side", "name"),
    [
        (metrics(psnr=40), 32, "exact"),
        (metrics(psnr=160), 224, "exact"),
        (metrics(psnr=below(40)), 32, "recognisable"),
        (metrics(psnr=20), 32, "recognisable"),
        (metrics(psnr=below(20)), 32, "partial"),
        (metrics(ssim=0.5), 32, "recognisable"),
        (metrics(ssim=below(0.5)), 32, "failed"),
        (metrics(pearson_quarter=0.7), 128, "recognisable"),
        (metrics(pearson_quarter=below(0.7)), 128, "failed"),
        (metrics(pearson_quarter=0.7), 127, "failed"),
        (metrics(pearson_quarter=1), 32, "failed"),
        (metrics(psnr=9), 32, "partial"),
        (metrics(psnr=below(9)), 32, "failed"),
        ({"psnr": 9.0, "pearson_quarter": 0.0}, 8, "partial"),
        ({"psnr": 8.9, "pearson_quarter": 0.0}, 8, "failed"),
        (metrics(psnr=math.nan, ssim=math.nan, pearson_quarter=math.nan), 224, "failed"),
    ],
)
def test_tiers_begin_at_their_thresholds(values: dict[str, float], side: int, name: str) -> None:
    grey = metrics(psnr=8, ssim=0, pearson_quarter=0)
    colour = metrics(psnr=7, ssim=0.05, pearson_quarter=0.05)
    assert tier(values, [grey, colour], side) == name
    assert name in TIERS


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (metrics(psnr=20.9), "failed"),
        (metrics(psnr=21), "recognisable"),
        (metrics(ssim=0.8), "failed"),
        (metrics(ssim=0.81), "recognisable"),
        (metrics(pearson_quarter=0.9), "failed"),
        (metrics(pearson_quarter=0.91), "recognisable"),
        (metrics(psnr=40), "exact"),
    ],
)
def test_what_a_uniform_colour_reaches_makes_nothing_recognisable(
    values: dict[str, float], name: str
) -> None:
    colour = metrics(psnr=20, ssim=0.8, pearson_quarter=0.9)
    assert tier(values, [metrics(psnr=10), colour], 224) == name


def test_no_trivial_baseline_of_a_photo_is_recognisable() -> None:
    photos = DATASETS.make(DATASETS.spec("photos"), None)
    for index, side in itertools.product(range(len(photos)), (32, 224)):
        truth = prepare(photos.image(index), side, "fit", 3)[None]
        rows = [fidelity(one, truth)[0] for one in baselines(truth).values()]
        assert {tier(row, rows, side) for row in rows} == {"failed"}


def test_tiers_are_in_order() -> None:
    assert TIERS == ("failed", "partial", "recognisable", "exact")


@pytest.mark.parametrize(
    ("history", "step"),
    [
        ([], None),
        ([None], None),
        ([0.5, None], None),
        ([0.5], None),
        ([0.5, 0.5, 0.5], None),
        ([1.0, 0.1, 0.01, 0.001], 3),
        ([8.0, 4.0, 2.0, 1.0], 2),
        ([8.0, 2.0, 2.001, 1.0], 3),
        ([1.0, 5.0, 1.0], None),
        ([3.0, 5.0, 1.0], 2),
        ([None, 0.1, 0.1], 1),
        ([0.1, None, 0.1], None),
        ([0.1, 0.2, 0.1], None),
        ([0.0, 0.0], None),
        ([0.1, 0.0], 1),
        ([1.0, 2.0, 4.0], None),
    ],
)
def test_known_convergence_steps(history: list[float | None], step: int | None) -> None:
    assert convergence_step(history) == step


@settings(max_examples=100)
@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=20))
def test_from_its_convergence_step_the_error_stays_small(history: list[float | None]) -> None:
    step, final = convergence_step(history), history[-1]
    started_near = final is not None and history[0] is not None and history[0] <= 2 * final
    assert (step is None) == (final is None or started_near)
    if step is None or final is None:
        return

    def near(value: float | None) -> bool:
        return value is not None and value <= 2 * final

    assert all(map(near, history[step:]))
    assert step == 0 or not near(history[step - 1])


def test_pearson_is_bounded_for_parallel_images() -> None:
    truth = images((5, 3, 7, 7), dtype=torch.float32)
    for gain in (0.1, 0.5, 1.0, -1.0):
        values = pearson(gain * truth, truth)
        assert (values.abs() <= 1).all()
        torch.testing.assert_close(values, torch.full((5,), math.copysign(1, gain)))
