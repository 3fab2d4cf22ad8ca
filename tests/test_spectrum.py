"""The basis of frequencies against scipy's transform."""

from __future__ import annotations

import pytest
import scipy.fft
import torch

from dlgbench.spectrum import FALL, Spectrum

SIZES = [(1, 1), (4, 4), (5, 8), (32, 32), (224, 224)]


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def basis(channels: int, height: int, width: int) -> Spectrum:
    return Spectrum((channels, height, width), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_basis_is_the_orthonormal_cosine_transform(height: int, width: int) -> None:
    spectrum, images = basis(1, height, width), noise(height, width)[:, :1]
    theirs = torch.from_numpy(scipy.fft.dctn(images.numpy(), axes=(-2, -1), norm="ortho"))
    torch.testing.assert_close(spectrum.coefficients(images) * spectrum.amplitude, theirs)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_coefficients_and_images_are_inverses(height: int, width: int, channels: int) -> None:
    spectrum, images = basis(channels, height, width), noise(height, width)[:, :channels]
    torch.testing.assert_close(spectrum.images(spectrum.coefficients(images)), images)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_covariance_is_that_of_images_with_unit_coefficients(channels: int) -> None:
    spectrum, count = basis(channels, 5, 4), channels * 20
    units = torch.eye(count, dtype=torch.float64).view(-1, channels, 5, 4)
    images = spectrum.images(units).flatten(1)
    torch.testing.assert_close(spectrum.covariance(), images.T @ images)
    torch.testing.assert_close(spectrum.covariance(-1) @ spectrum.covariance(), units.flatten(1))


def test_the_amplitude_falls_with_cycles_per_image() -> None:
    (amplitude,) = basis(1, 64, 64).amplitude
    assert float(amplitude[0, 0]) == float(amplitude[0, 2]) == 1  # a constant, and one cycle
    assert float(amplitude[0, 20]) == pytest.approx(10**-FALL)
    assert float(amplitude[6, 8]) == pytest.approx(5**-FALL)


def test_grey_images_are_brightness_alone() -> None:
    grey = noise(8, 8)[:, :1].expand(-1, 3, -1, -1)
    brightness, *colours = basis(3, 8, 8).coefficients(grey).unbind(1)
    assert float(torch.stack(colours).abs().max()) < 1e-12
    theirs = basis(1, 8, 8).coefficients(grey[:, :1])[:, 0] * 3**0.5
    torch.testing.assert_close(brightness * basis(3, 8, 8).amplitude[0, 0, 0], theirs)


def test_colours_leave_the_expected_power_as_it_is() -> None:
    assert float(basis(3, 8, 8).amplitude.square().sum()) == pytest.approx(
        3 * float(basis(1, 8, 8).amplitude.square().sum())
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fall", [0.0, FALL, 1.0])
def test_usual_coefficients_make_pixels_of_size_one(channels: int, fall: float) -> None:
    spectrum = Spectrum((channels, 5, 8), torch.zeros((), dtype=torch.float64), fall)
    images = spectrum.images(torch.full((1, channels, 5, 8), spectrum.usual, dtype=torch.float64))
    assert float(images.square().mean()) == pytest.approx(1)
