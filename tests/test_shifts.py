"""Known answers: gradients of convolutions whose slopes and inputs were drawn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlgbench.shifts import LARGEST, slopes, unmix


def leaked(seed: int, channels: int, height: int, width: int, kernel: int = 3) -> tuple[Tensor, Tensor]:
    """The gradient of a convolution's weight, by autograd, and the slope at its output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(channels, channels, kernel, kernel), (1, channels, height, width), (channels, height, width)]
    weight, features, truth = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    weight.requires_grad_()
    loss = (F.conv2d(features, weight, padding=kernel // 2)[0] * truth).sum()
    return torch.autograd.grad(loss, weight)[0], truth


def alike(found: Tensor | None, truth: Tensor) -> float:
    """The absolute cosine similarity: a factor is left open."""
    assert found is not None
    return abs(float(F.cosine_similarity(found.flatten(), truth.flatten(), dim=0)))


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5), st.sampled_from([3, 5]))
def test_the_slope_is_told_by_the_gradient_alone(seed: int, height: int, width: int, kernel: int) -> None:
    gradient, truth = leaked(seed, 2 * height * width, height, width, kernel)
    assert alike(slopes(gradient, 1, height, width), truth) > 1 - 1e-9


def test_as_many_positions_as_channels_are_enough() -> None:
    gradient, truth = leaked(0, 16, 4, 4)
    assert alike(slopes(gradient, 1, 4, 4), truth) > 1 - 1e-9
    assert slopes(leaked(0, 15, 4, 4)[0], 1, 4, 4) is None


def test_more_positions_than_can_be_written_out_are_left_alone() -> None:
    assert slopes(torch.zeros(LARGEST + 1, LARGEST + 1, 3, 3), LARGEST + 1, 1, 1) is None


def test_a_single_tap_tells_nothing() -> None:
    assert slopes(leaked(0, 16, 3, 3, kernel=1)[0], 1, 3, 3) is None


def test_rounding_to_single_precision_costs_little() -> None:
    gradient, truth = leaked(0, 64, 4, 4)
    assert alike(slopes(gradient.float().double(), 1, 4, 4), truth) > 1 - 1e-9


@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_a_gradient_that_tells_nothing_has_no_slope(factor: float) -> None:
    assert slopes(leaked(0, 16, 3, 3)[0] * factor, 1, 3, 3) is None


def test_noise_has_no_slope() -> None:
    gradient, _ = leaked(0, 16, 3, 3)
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1)).to(gradient)
    assert slopes(gradient + gradient.std() * noise, 1, 3, 3) is None


@pytest.mark.parametrize("images", [2, 3, 4])
def test_images_come_apart_where_units_are_rectified(images: int) -> None:
    generator = torch.Generator().manual_seed(images)
    features, truth = (
        torch.randn(images, 64, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    weight = torch.randn(64, 64, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    loss = (F.conv2d(features.relu(), weight, padding=1) * truth).sum()
    found = slopes(torch.autograd.grad(loss, weight)[0], images, 3, 3)
    assert found is not None
    cosines = F.cosine_similarity(found.flatten(1)[:, None], truth.flatten(1)[None], dim=2).abs()
    best = cosines.max(1)
    assert sorted(best.indices.tolist()) == list(range(images))
    assert float(best.values.min()) > 1 - 1e-9


def test_directions_are_told_from_samples_of_one_image() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    factors = torch.randn(3, 2000, generator=generator, dtype=torch.float64).relu()
    found = unmix(directions @ factors)
    assert found is not None
    cosines = F.cosine_similarity(found[:, :, None], directions[:, None], dim=0)
    assert torch.allclose(cosines.max(1).values, torch.ones(3, dtype=torch.float64))
    assert sorted(cosines.argmax(1).tolist()) == [0, 1, 2]


def test_what_is_never_alone_does_not_come_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    assert unmix(torch.rand(3, 2000, generator=generator, dtype=torch.float64)) is None
