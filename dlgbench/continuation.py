"""An image from a few rectified layers: soft and pale at first, then ever sharper.

A rectified unit has a kink, and a descent ends at the first pattern of living units that it cannot leave.
With wide bends there are none, but what fits the wrong network is noise, unless a prior keeps it out that is
as strong as the network is wrong.  So both shrink together: a continuation (Allgower and Georg 1990,
"Numerical continuation methods", chapter 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from dlgbench.leak import Tensors
from dlgbench.newton import residual_of
from dlgbench.softening import bent
from dlgbench.spectrum import CONTRAST, Spectrum

LARGEST = 3072
"""Unknowns: a colour image of 32 pixels a side, five seconds on two CPU cores."""
WIDEST, NARROWEST, LEVELS = 1.0, 0.002, 14
"""The bends, in units of the features' root mean square, from level to level by the same factor."""
PRIOR = 0.1
"""The weight of the coefficients' mean square, in units of the bend squared, which is about what a bent
network misses of the truth's features and gradients.  Measured on lenet5: docs/attacks.md."""
ITERATIONS, HISTORY = 80, 100
"""Of L-BFGS on each level."""


def solve(
    trunk: fx.GraphModule,
    weights: Tensors,
    gradients: Tensors,
    features: Tensor,
    slope: Tensor,
    shape: tuple[int, ...],
) -> Tensor:
    """As `newton.solve`, for a ``trunk`` whose units are rectified; NaN where the leak is not finite."""
    spectrum = Spectrum(shape[-3:], slope)
    unknown = torch.zeros(shape).to(slope).requires_grad_()

    def images() -> Tensor:
        return 0.5 + CONTRAST * spectrum.images(unknown)

    for bend in torch.logspace(math.log10(WIDEST), math.log10(NARROWEST), LEVELS).tolist():
        residual = residual_of(bent(trunk, 1 / bend), weights, gradients, features, slope)
        if not residual(images().detach()).isfinite().all():
            return torch.full_like(unknown, torch.nan)
        _descend(lambda: residual(images()).square().sum() + _prior(unknown, bend), unknown)  # noqa: B023
    return images().detach()


def _prior(coefficients: Tensor, bend: float) -> Tensor:
    return PRIOR * bend**2 * coefficients.square().mean()


def _descend(objective: Callable[[], Tensor], unknown: Tensor) -> None:
    """Move ``unknown`` to where the objective is low."""
    optimizer = torch.optim.LBFGS(
        [unknown], max_iter=ITERATIONS, max_eval=2 * ITERATIONS, history_size=HISTORY,
        tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        value = objective()
        (unknown.grad,) = torch.autograd.grad(value, unknown)
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
