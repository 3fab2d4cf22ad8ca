"""Images by their frequencies: a basis in which natural images have about equally large coefficients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FALL = 0.75
"""How fast the amplitude falls with frequency.  Natural images fall with 1 (Field 1987, "Relations between
the statistics of natural images and the response properties of cortical cells"); measured on resnet18 at
224 px, 500 closures: 10.9 dB after the best affine map without a fall, 16.1 with 0.5, 17.3 with 0.75, 16.5
with 1."""


class Spectrum:
    """Coefficients of the discrete cosine transform, each in units of its expected amplitude.

    A gradient descent in these coefficients moves low frequencies first, so that what a gradient does
    not determine stays smooth instead of noisy.
    """

    def __init__(self, height: int, width: int, like: Tensor) -> None:
        """``like`` gives the dtype and the device."""
        self.rows, self.columns = (_cosines(n).to(like) for n in (height, width))
        frequency = torch.hypot(torch.arange(height)[:, None] / 2, torch.arange(width) / 2)
        self.amplitude = frequency.clamp_min(1).pow(-FALL).to(like)

    def images(self, coefficients: Tensor) -> Tensor:
        """Deviations from grey, ``(…, height, width)``, shaped like the coefficients."""
        return self.rows.T @ (self.amplitude * coefficients) @ self.columns

    def coefficients(self, images: Tensor) -> Tensor:
        """The inverse of `images`."""
        return self.rows @ images @ self.columns.T / self.amplitude


def _cosines(n: int) -> Tensor:
    """The orthonormal matrix of the discrete cosine transform II, frequencies × positions."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = math.sqrt(2 / n) * torch.cos(math.pi * k[:, None] * (k + 0.5) / n)
    matrix[0] /= math.sqrt(2)
    return matrix
