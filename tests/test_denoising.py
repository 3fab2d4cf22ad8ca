"""Non-local means against a bare loop, what it does to known noise, and what it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlgbench.denoising import PATCH, REACH, denoised
from dlgbench.metrics import psnr
from dlgbench.victims import secret_of

from .clients import PHOTOS, case


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double()


def textbook(image: Tensor, strength: float) -> Tensor:
    """Pixel by pixel, each number looked up where it is mirrored to."""
    height, width = image.shape[1:]
    mean = torch.zeros_like(image)

    def mirrored(place: int, size: int) -> int:
        return size - 1 - abs(size - 1 - abs(place))

    def patch(row: int, column: int) -> Tensor:
        around = range(-(PATCH // 2), PATCH // 2 + 1)
        rows, columns = ([mirrored(at + i, n) for i in around] for at, n in ((row, height), (column, width)))
        return image[:, rows][:, :, columns]

    for row in range(height):
        for column in range(width):
            total = 0.0
            for i in range(row - REACH, row + REACH + 1):
                for j in range(column - REACH, column + REACH + 1):
                    square = float((patch(i, j) - patch(row, column)).square().mean())
                    weight = math.exp(-square / strength**2)
                    mean[:, row, column] += weight * image[:, mirrored(i, height), mirrored(j, width)]
                    total += weight
            mean[:, row, column] /= total
    return mean


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_non_local_means(channels: int) -> None:
    images, strengths = drawn(2, channels, 8, 9), torch.tensor([0.2, 0.5]).double()
    expected = [textbook(image, float(h)) for image, h in zip(images, strengths, strict=True)]
    torch.testing.assert_close(denoised(images, strengths), torch.stack(expected))


@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(-10, 10))
@settings(max_examples=20, deadline=None)
def test_it_goes_with_the_images_unit_and_origin(seed: int, factor: float, shift: float) -> None:
    images, strength = drawn(1, 3, 12, 10, seed=seed), torch.tensor([0.3]).double()
    found = denoised(factor * images + shift, factor * strength)
    torch.testing.assert_close(found, factor * denoised(images, strength) + shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_strength_images_stay_as_they_are(dtype: torch.dtype) -> None:
    images = drawn(2, 3, 20, 20).to(dtype)
    assert torch.equal(denoised(images, torch.zeros(2, dtype=dtype)), images)


def test_what_repeats_loses_its_noise_and_keeps_its_edges() -> None:
    stripes = (torch.arange(32).double() // 4 % 2).expand(1, 1, 32, 32)
    noise = 0.05 * torch.randn(stripes.shape, generator=torch.Generator().manual_seed(0)).double()
    found = denoised(stripes + noise, torch.tensor([0.15]).double())
    assert float((found - stripes).square().mean()) < float(noise.square().mean()) / 8


@pytest.mark.parametrize("image", range(5))
def test_photos_lose_more_noise_than_detail(image: int) -> None:
    photo = secret_of(case(network="resnet18", resolution=64, image=image), PHOTOS).images[0].double()
    noisy = photo + 0.08 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0)).double()
    found = denoised(noisy, torch.tensor([0.1]).double())
    before, after = (psnr((images - photo).square().mean()) for images in (noisy, found))
    assert float(after) > float(before) + 2
