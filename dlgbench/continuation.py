"""An image from a few rectified layers: soft and pale at first, then ever sharper.

A rectified unit has a kink, and a descent ends at the first pattern of living units that it cannot leave.
With wide bends there are none, but what fits the wrong network is noise, unless a prior keeps it out that is
as strong as the network is wrong.  So both shrink together: a continuation (Allgower and Georg 1990,
"Numerical continuation methods", chapter 1).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from dlgbench import inversion
from dlgbench.newton import Segment
from dlgbench.softening import bent
from dlgbench.spectrum import CONTRAST, Spectrum

LARGEST = 3072
"""Unknowns: a colour image of 32 pixels a side, five seconds on two CPU cores."""
WIDEST, NARROWEST, LEVELS = 1.0, 0.002, 14
"""The bends, in units of the features' root mean square, from level to level by the same factor."""
PRIOR = 0.1
"""The weight of the coefficients' mean square, in units of the bend squared, which is about what a bent
network misses of the truth's features and gradients.  Measured on lenet5: docs/tried.md."""
ITERATIONS, HISTORY = 80, 100
"""Of L-BFGS on each level."""


def solve(segment: Segment, shape: tuple[int, ...]) -> Tensor:
    """As `newton.solve`, for rectified units; NaN where what is known has no finite residual."""
    spectrum = Spectrum(shape[-3:], segment.slope)
    unknown = torch.zeros(shape).to(segment.slope).requires_grad_()

    def images() -> Tensor:
        return 0.5 + CONTRAST * spectrum.images(unknown)

    def objective(soft: Segment, prior: float) -> Tensor:
        return soft.residual(images()).square().sum() + prior * unknown.square().mean()

    if not segment.residual(images().detach()).isfinite().all():
        return torch.full_like(unknown, torch.nan)
    for bend in torch.logspace(math.log10(WIDEST), math.log10(NARROWEST), LEVELS).tolist():
        soft = segment._replace(trunk=bent(segment.trunk, 1 / bend))
        squares = partial(objective, soft, PRIOR * bend**2)
        inversion.descend(squares, unknown, iterations=ITERATIONS, history=HISTORY)
    return images().detach()
