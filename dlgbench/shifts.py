"""What a convolution sees from nothing but the gradient of its weight: its taps see one image, shifted.

That gradient is ``slopes @ patches``, the loss's gradient at the output times what each position sees.
Where there are no more positions than channels its rows span those of the patches, and of all the matrices
that map this span's basis to patches only one, but for a factor, makes the taps shifts of each other: only
multiples of 1 commute with all shifts of an image that is padded with zeros.  Several images are found mixed.
What is mixed comes apart where units are rectified: those that live in one image only, point its way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 256
"""Positions of all images together: what is sought has their square of entries."""
FAINT = 1e-6
"""The least singular value of a gradient that can be told from rounding, in units of the largest."""
MISFIT = 1e-6
"""The squared misfit of the solution to all taps, in units of its size: of a random matrix it is about 1."""
ITERATIONS, CONVERGED = 1000, 1e-24
"""Of conjugate gradients, and the squared residual at which they end, in units of the first."""
FAINTEST, PARALLEL, FEWEST = 0.02, 1e-8, 8
"""Samples that count, in units of the largest, from what sine squared on they are not parallel, and how many
have to be."""
CHUNK = 1024
"""Samples that are compared to all at once."""


def slopes(gradient: Tensor, images: int, height: int, width: int) -> Tensor | None:
    """The loss's gradient at the output, ``(image, channel, height, width)``, each but for a factor; float64.

    ``gradient`` is that of the weight ``(output, input, kernel, kernel)`` of a convolution whose output is as
    large as its input; of several images that must have no negative entries, and their order is lost.  None
    where there are too many positions, a single tap, or the gradient does not determine them.
    """
    positions, (outputs, inputs, kernel, across) = images * height * width, gradient.shape
    if kernel == 1 or kernel != across or positions > min(outputs, inputs, LARGEST):
        return None
    if not gradient.isfinite().all():
        return None
    rows, sizes, columns = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    if not sizes[positions - 1] > FAINT * sizes[0]:
        return None
    taps = columns[:positions].view(positions, inputs, -1).permute(2, 0, 1).contiguous()
    patches = _patches(taps, images, _shifts(height, width, kernel).to(gradient))
    if patches is None:
        return None
    mixed = (patches @ taps[len(taps) // 2]).flatten(1)
    mixture = unmix(mixed) if images > 1 else torch.ones_like(sizes[:1, None])
    if mixture is None:
        return None
    found = rows[:, :positions] * sizes[:positions] @ torch.linalg.inv(patches.flatten(0, 1))
    apart = torch.einsum("omp,mi->iop", found.view(outputs, images, -1), mixture)
    return apart.view(images, outputs, height, width)


def _patches(taps: Tensor, images: int, shifts: Tensor) -> Tensor | None:
    """The map from the basis to what each position sees, ``(image, position, basis)``, but for a mixture.

    The nearest to a random one of those with ``M taps[k] = shifts[k] M taps[centre]`` for every tap k.
    """
    centre = taps[len(taps) // 2]
    own, cross, square = (taps @ taps.mT).sum(0), centre @ taps.mT, centre @ centre.T

    def form(matrix: Tensor) -> Tensor:
        """Half the gradient of ``sum_k |M taps[k] - shifts[k] M taps[centre]|^2``."""
        ahead = shifts[:, None] @ (matrix @ cross[:, None])
        back = shifts.mT[:, None] @ (matrix @ cross.mT[:, None])
        twice = (shifts.mT @ shifts).sum(0) @ matrix @ square
        return matrix @ own - ahead.sum(0) - back.sum(0) + twice

    shape = images, len(shifts[0]), len(centre)
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(taps)
    found -= _conjugate_gradients(form, form(found))
    misfit = (found * form(found)).sum() / found.square().sum()
    return found if misfit < MISFIT else None


def _conjugate_gradients(form: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """A solution of ``form(x) = wanted``, for a semidefinite form and what lies in its range."""
    found, rest = torch.zeros_like(wanted), wanted.clone()
    direction, size = rest.clone(), rest.square().sum()
    end = CONVERGED * size
    for _ in range(ITERATIONS):
        if not size > end:
            break
        curved = form(direction)
        step = size / (direction * curved).sum()
        found += step * direction
        rest -= step * curved
        size, last = rest.square().sum(), size
        direction = rest + size / last * direction
    return found


def unmix(mixed: Tensor) -> Tensor | None:
    """The directions ``(image, image)``, a column each, that samples ``(image, sample)`` are made of.

    None of the factors is negative, and of every direction there are samples that are nothing else: many
    are then parallel.  None where too few are.
    """
    sizes = mixed.norm(dim=0)
    units = (mixed / sizes)[:, sizes > FAINTEST * sizes.max()]

    def parallel(some: Tensor) -> Tensor:
        return torch.gt(some.T @ units, 1 - PARALLEL / 2)

    counts = torch.cat([parallel(some).sum(1) for some in units.split(CHUNK, 1)])
    found = []
    for _ in range(len(mixed)):
        if counts.max() < FEWEST:
            return None
        same = parallel(units[:, counts.argmax(), None])[0]
        found.append(units[:, same].mean(1))
        counts[same] = 0
    return torch.stack(found, 1)


def _shifts(height: int, width: int, kernel: int) -> Tensor:
    """Which position every tap sees from every other, ``(tap, position, position)``."""
    images = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    return F.unfold(images, kernel, padding=kernel // 2).permute(1, 2, 0).contiguous()
