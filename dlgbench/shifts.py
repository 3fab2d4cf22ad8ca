"""A convolution's input from nothing but the gradient of its weight: its taps see one image, shifted.

That gradient is ``slope @ patches``, the loss's gradient at the output times what each position sees.
Where there are no more positions than channels its rows span those of the patches, and of all the matrices
that map this span's basis to patches only one (but for a factor) makes the taps shifts of each other:
only multiples of 1 commute with all shifts of an image that is padded with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 64
"""Positions: the matrix sought has their square of entries, and its equations that of those."""
FAINT = 1e-6
"""The least singular value of a gradient that can be told from rounding, in units of the largest."""
UNIQUE = 1e-3
"""The misfit of the solution, in units of that of the second best."""


def slope(gradient: Tensor, height: int, width: int) -> Tensor | None:
    """The loss's gradient at the output ``(channel, height, width)``, but for a factor; float64.

    ``gradient`` is that of the weight ``(output, input, kernel, kernel)`` of a convolution whose output is as
    large as its input.  None where there are too many positions or the gradient does not determine it.
    """
    positions, (outputs, inputs, kernel, _) = height * width, gradient.shape
    if positions > min(outputs, inputs, LARGEST) or not gradient.isfinite().all():
        return None
    rows, sizes, columns = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    if not sizes[positions - 1] > FAINT * sizes[0]:
        return None
    taps = columns[:positions].view(positions, inputs, -1).permute(2, 0, 1).contiguous()
    misfits, solutions = torch.linalg.eigh(_equations(taps, _shifts(height, width, kernel).to(gradient)))
    if positions > 1 and not misfits[0] < UNIQUE * misfits[1]:
        return None
    patches = solutions[:, 0].view(positions, positions)
    found: Tensor = rows[:, :positions] * sizes[:positions] @ torch.linalg.inv(patches)
    return found.view(outputs, height, width)


def _equations(taps: Tensor, shifts: Tensor) -> Tensor:
    """The quadratic form ``sum_k |M taps[k] - shifts[k] M taps[centre]|^2`` in the entries of M."""
    centre = taps[len(taps) // 2]
    one = torch.eye(len(centre)).to(centre)
    form = torch.zeros(one.numel(), one.numel()).to(centre)
    for tap, shift in zip(taps, shifts, strict=True):
        cross = torch.kron(shift, tap @ centre.T)
        form += torch.kron(one, tap @ tap.T) + torch.kron(shift.T @ shift, centre @ centre.T)
        form -= cross + cross.T
    return form


def _shifts(height: int, width: int, kernel: int) -> Tensor:
    """Which position every tap sees from every other, ``(tap, position, position)``."""
    images = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    return F.unfold(images, kernel, padding=kernel // 2).permute(1, 2, 0).contiguous()
