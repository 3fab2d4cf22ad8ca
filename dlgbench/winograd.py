"""Convolutions of 3 x 3 pixels with 16 products for every 4 pixels of output, where 36 are usual.

F(2 x 2, 3 x 3) of Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", section 4.1:
tiles of 4 x 4 pixels that overlap by two are mapped by B, kernels by G, and the products of the two,
summed over the channels, by A.  In float32 it errs like the direct sum: half as much on the layers
of ResNet-18.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dlgbench.bilinear import kept, linear, product
from dlgbench.window import Grid, Window

Combine = Callable[..., Sequence[Tensor]]


def convolution(images: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """Of images ``(image, height, width, channel)`` and kernels ``(output, 3, 3, channel)``.

    Returns ``(image, row, column, output)``.  The window is that of the kernels, with a stride of 1.
    """
    high, wide = (-(-places // 2) for places in window.places)
    tile = window._replace(kernel=(4, 4), stride=2, places=(high, wide))
    square = Window((2, 2), 2, (0, 0), window.places, tile.places)
    tiles = linear(images, partial(_tiles, tile), partial(_of_tiles, tile))
    products = product(tiles, linear(kernels, _kernels, _of_kernels))
    return linear(products, partial(_outputs, square), partial(_of_outputs, square))


# Each map acts on rows and on columns; the map of the same name with "of" is its transpose.


def _tiles(window: Window, images: Tensor) -> Tensor:
    """→ ``(16, image row column, channel)``"""
    return _stacked(_both(_bt, window.views(images))).flatten(1, 3)


def _of_tiles(window: Window, mapped: Tensor) -> Tensor:
    return kept(window.sums(_both(_b, _grid(mapped, window))))


def _outputs(window: Window, products: Tensor) -> Tensor:
    """→ ``(image, row, column, output)``"""
    return window.sums(_both(_at, _grid(products, window)))


def _of_outputs(window: Window, outputs: Tensor) -> Tensor:
    return _stacked(_both(_a, window.views(outputs))).flatten(1, 3)


def _kernels(kernels: Tensor) -> Tensor:
    """→ ``(16, output, channel)``"""
    return _stacked(_both(_g, kernels.permute(1, 2, 0, 3)))


def _of_kernels(mapped: Tensor) -> Tensor:
    grid = _both(_gt, mapped.reshape(4, 4, *mapped.shape[1:]))
    return torch.stack([torch.stack(list(row), 1) for row in grid], 1)


def _grid(mapped: Tensor, window: Window) -> Tensor:
    return mapped.reshape(4, 4, -1, *window.places, mapped.shape[-1])


def _both(combine: Combine, grid: Tensor) -> Grid:
    """``combine`` applied along the first dimension of ``grid``, then along the second."""
    columns = [combine(*column) for column in zip(*(row.unbind() for row in grid.unbind()), strict=True)]
    return [combine(*row) for row in zip(*columns, strict=True)]


def _stacked(grid: Grid) -> Tensor:
    return torch.stack([one for row in grid for one in row])


def _bt(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Sequence[Tensor]:
    return a - c, b + c, c - b, b - d


def _b(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Sequence[Tensor]:
    return a, b - c + d, b + c - a, -d


def _at(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Sequence[Tensor]:
    return a + b + c, b - c - d


def _a(a: Tensor, b: Tensor) -> Sequence[Tensor]:
    return a, a + b, a - b, -b


def _g(a: Tensor, b: Tensor, c: Tensor) -> Sequence[Tensor]:
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _gt(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Sequence[Tensor]:
    return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d
