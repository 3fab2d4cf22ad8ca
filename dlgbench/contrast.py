"""How much contrast images have: a guess, for where a gradient does not tell."""

from __future__ import annotations

import torch
from torch import Tensor

CLIPPED = 0.02
"""The share of pixels that may lie beyond black and white."""


def most(deviations: Tensor, middle: Tensor) -> Tensor:
    """By what to multiply each case's ``deviations`` from the ``middle``, ``(case, 1, 1, 1, 1)``.

    The factor that leaves all but `CLIPPED` of the pixels in [0, 1]; 1 where there is nothing to multiply.
    ``deviations`` are ``(case, image, channel, height, width)``, ``middle`` one number a channel.
    """
    room = torch.where(deviations < 0, middle, 1 - middle) / deviations.abs()
    room = torch.where(room > 0, room, torch.inf)  # of what is outside at any factor
    factor = torch.quantile(room.flatten(1), CLIPPED, dim=1).view(-1, 1, 1, 1, 1)
    return torch.where(factor.isfinite(), factor, 1)
