"""The basis of frequencies against scipy's transform."""

from __future__ import annotations

import pytest
import scipy.fft
import torch

from dlgbench.spectrum import FALL, Spectrum

SIZES = [(1, 1), (4, 4), (5, 8), (32, 32), (224, 224)]


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_basis_is_the_orthonormal_cosine_transform(height: int, width: int) -> None:
    spectrum, images = Spectrum(height, width, torch.zeros((), dtype=torch.float64)), noise(height, width)
    theirs = torch.from_numpy(scipy.fft.dctn(images.numpy(), axes=(-2, -1), norm="ortho"))
    torch.testing.assert_close(spectrum.coefficients(images) * spectrum.amplitude, theirs)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_coefficients_and_images_are_inverses(height: int, width: int) -> None:
    spectrum, images = Spectrum(height, width, torch.zeros((), dtype=torch.float64)), noise(height, width)
    torch.testing.assert_close(spectrum.images(spectrum.coefficients(images)), images)


def test_the_amplitude_falls_with_cycles_per_image() -> None:
    amplitude = Spectrum(64, 64, torch.zeros(())).amplitude
    assert float(amplitude[0, 0]) == float(amplitude[0, 2]) == 1  # a constant, and one cycle
    assert float(amplitude[0, 20]) == pytest.approx(10**-FALL)
    assert float(amplitude[6, 8]) == pytest.approx(5**-FALL)
