"""A window that slides over images: what it sees at every place, and the transpose of that.

Images are ``(image, height, width, channel)`` here, whatever their order in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Sides = tuple[int, int]
Grid = Sequence[Sequence[Tensor]]


class Window(NamedTuple):
    """It is ``kernel`` pixels high and wide and moves by ``stride``, over so many ``places``.

    The first place is ``padding`` pixels above and left of the image, whose ``sides`` are its height
    and width; all that is outside the image is 0.
    """

    kernel: Sides
    stride: int
    padding: Sides
    sides: Sides
    places: Sides

    @classmethod
    def of(cls, kernel: Sides, stride: int, padding: Sides, sides: Sides) -> Window:
        """The window of a convolution: as many places as fit into the padded image."""
        high, wide = (
            (side + 2 * beside - long) // stride + 1
            for side, beside, long in zip(sides, padding, kernel, strict=True)
        )
        return cls(kernel, stride, padding, sides, (high, wide))

    def views(self, images: Tensor) -> Tensor:
        """What is seen: ``(kernel row, kernel column, image, row, column, channel)``."""
        (top, left), (height, width), (high, wide) = self.padding, self.sides, self._extent
        padded = F.pad(images, (0, 0, left, wide - width - left, top, high - height - top)).contiguous()
        image, row, column, channel = padded.stride()
        return padded.as_strided(  # of which inductor makes faster code than of slices
            (*self.kernel, len(images), *self.places, images.shape[-1]),
            (row, column, image, self.stride * row, self.stride * column, channel),
        )

    def sums(self, seen: Grid) -> Tensor:
        """The transpose of `views`: every pixel is the sum of what is seen of it.

        ``seen[i][j]``, ``(image, row, column, channel)``, is at row i and column j of the window.
        """
        # pixels i mod stride, j mod stride apart are in no window together: each such set is a sum of
        # shifted grids
        step, (rows, columns) = range(self.stride), self.places
        high, wide = (-(-side // self.stride) for side in self._extent)

        def shifted(down: int, right: int) -> list[Tensor]:
            return [
                F.pad(seen[i][j], (0, 0, b, wide - columns - b, a, high - rows - a))
                for a, i in enumerate(range(down, self.kernel[0], self.stride))
                for b, j in enumerate(range(right, self.kernel[1], self.stride))
            ]

        unseen = torch.zeros_like(F.pad(seen[0][0], (0, 0, 0, wide - columns, 0, high - rows)))
        sets = [[reduce(torch.add, shifted(i, j) or [unseen]) for j in step] for i in step]
        (top, left), (height, width) = self.padding, self.sides
        return interleaved(sets)[:, top : top + height, left : left + width]

    @property
    def _extent(self) -> tuple[int, int]:
        """Rows and columns from the first place on that hold the image and all that is seen."""
        each = zip(self.kernel, self.padding, self.sides, self.places, strict=True)
        high, wide = (
            max(before + side, self.stride * (places - 1) + long) for long, before, side, places in each
        )
        return high, wide


def interleaved(grid: Grid) -> Tensor:
    """Images of which ``grid[i][j]`` holds every pixel whose row is i and whose column j modulo its sides."""
    rows = [torch.stack(list(row), 3) for row in grid]
    return torch.stack(rows, 2).flatten(3, 4).flatten(1, 2)
