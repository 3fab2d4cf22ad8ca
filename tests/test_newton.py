"""Gauss-Newton against scipy, on problems whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import least_squares
from torch import Tensor

from dlgbench.newton import gauss_newton


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def bent(x: Tensor) -> Tensor:
    """Four equations for three unknowns, met by (1, 2, 3)."""
    return torch.stack([x[0] ** 2 - 1, x[1] * x[0] - 2, (x[2] / 3).exp() - math.e, x.sum() - 6])


@pytest.mark.parametrize("residual", [rosenbrock, bent])
def test_the_minimum_is_scipys(residual: object) -> None:
    assert callable(residual)
    start = torch.tensor([-1.2, 1.0] if residual is rosenbrock else [0.5, 0.5, 0.5], dtype=torch.float64)
    theirs = least_squares(
        lambda x: residual(torch.from_numpy(x)).numpy(), start.numpy(), xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    found = gauss_newton(residual, start)
    torch.testing.assert_close(found, torch.from_numpy(theirs.x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("gain", "seed"), [*((2.0, seed) for seed in range(40)), (4.0, 34)])
def test_the_input_of_saturated_units_is_found(gain: float, seed: int) -> None:
    """The last ends elsewhere if the prior falls after every step; with seeds 11 and 35, if it begins low."""
    generator = torch.Generator().manual_seed(seed)
    inner, outer, truth = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((24, 12), (20, 24), (12,))
    )

    def outputs(x: Tensor) -> Tensor:
        return torch.mv(outer, torch.sigmoid(torch.mv(gain * inner, x)))

    def residual(x: Tensor) -> Tensor:
        return torch.div(outputs(x) - outputs(truth), outputs(truth).norm())

    found = gauss_newton(residual, torch.zeros_like(truth))
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
