"""Convolution as a product of matrices, for graphs that are going to be compiled.

A product is faster than oneDNN's convolutions, most of all than their derivatives: on two CPU cores a
closure of ResNet-18 spends 70 instead of 120 ms in them.  And under ``vmap`` PyTorch makes one grouped
convolution of many small ones, for which neither oneDNN nor cuDNN has fast code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.grad import conv2d_input

from dlgbench import winograd
from dlgbench.bilinear import kept, linear, product
from dlgbench.window import Window

VECTOR = 32
"""From how many kernels on channels are innermost in memory, where they fill a processor's vectors."""
TILES, CHANNELS, PIXELS = 49, 32, 200
"""Winograd's maps cost less than they save from so many tiles on and, a map of C channels to K, from this
C K / (C + K) on; copies of all that a larger kernel sees, up to so many pixels of output."""
_Method = Callable[[Tensor, Tensor, Window], Tensor]


class Conv2d(nn.Module):
    """``nn.Conv2d`` with one group, no dilation and one stride: it takes that layer's parameters."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding

    def forward(self, features: Tensor) -> Tensor:
        """Of ``(image, channel, height, width)``: PyTorch's own, unless a graph of it is being traced."""
        window = self._window(*features.shape[2:])
        method = _fastest(window, len(features), self.weight) if get_proxy_mode() else None
        if method is None:
            return F.conv2d(features, self.weight, self.bias, self.stride, self.padding)
        output = method(features, self.weight, window)
        return output if self.bias is None else output + self.bias[:, None, None]

    def _window(self, height: int, width: int) -> Window:
        (high, wide), (top, left) = self.kernel_size, map(int, self.padding)
        return Window.of((high, wide), self.stride[0], (top, left), (height, width))


def suited(layer: nn.Conv2d) -> nn.Module:
    """``layer`` as a `Conv2d` where it can be one, else as it is."""
    one = layer.groups == 1 and set(layer.dilation) == {1} and len(set(layer.stride)) == 1
    zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return Conv2d(layer) if one and zeros else layer


def input_slope(layer: Conv2d, weight: Tensor, slope: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The loss's gradient at the input, of this shape, of a convolution with these weights."""
    found = conv2d_input(shape, weight, slope, layer.stride, layer.padding)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def _fastest(window: Window, images: int, weight: Tensor) -> _Method | None:
    """None where PyTorch's own convolution is."""
    outputs, inputs = weight.shape[:2]
    if outputs < VECTOR:
        return _channels_first
    tiles = images * math.prod(-(-places // 2) for places in window.places)
    alone = window.kernel == (1, 1) or window.stride > 1  # hardly a pixel is seen twice
    enough = tiles >= TILES and outputs * inputs >= CHANNELS * (outputs + inputs)
    if window.kernel == (3, 3) and not alone and enough:
        return _winograd
    return _channels_last if alone or images * math.prod(window.places) <= PIXELS else None


def _winograd(features: Tensor, weight: Tensor, window: Window) -> Tensor:
    output = winograd.convolution(features.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1), window)
    return output.permute(0, 3, 1, 2)


def _channels_last(features: Tensor, weight: Tensor, window: Window) -> Tensor:
    rows = partial(_rows, window), partial(_of_rows, window)
    output = product(features.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1).flatten(1), rows)
    return output.view(-1, *window.places, len(weight)).permute(0, 3, 1, 2)


def _channels_first(features: Tensor, weight: Tensor, window: Window) -> Tensor:
    columns = linear(features, partial(_columns, window), partial(_of_columns, window))
    output = product(columns, weight.flatten(1), wanted="p")
    return output.view(-1, len(features), *window.places).transpose(0, 1)


# what the window sees, and the transpose of that, in two orders


def _rows(window: Window, images: Tensor) -> Tensor:
    """``(image, height, width, channel)`` → ``(image row column, kernel kernel channel)``"""
    return window.views(images).permute(2, 3, 4, 0, 1, 5).flatten(3).flatten(0, 2)


def _of_rows(window: Window, rows: Tensor) -> Tensor:
    seen = rows.reshape(-1, *window.places, *window.kernel, rows.shape[1] // math.prod(window.kernel))
    return kept(window.sums([row.unbind(3) for row in seen.unbind(3)]))


def _columns(window: Window, images: Tensor) -> Tensor:
    """``(image, channel, height, width)`` → ``(channel kernel kernel, image row column)``"""
    seen = window.views(images.transpose(0, 1).flatten(0, 1)[..., None])
    split = seen.view(*window.kernel, -1, len(images), *window.places)
    return split.permute(2, 0, 1, 3, 4, 5).flatten(3).flatten(0, 2)


def _of_columns(window: Window, columns: Tensor) -> Tensor:
    channels = len(columns) // math.prod(window.kernel)
    seen = columns.reshape(channels, *window.kernel, -1, *window.places)
    grid = [[one.flatten(0, 1)[..., None] for one in row.unbind(1)] for row in seen.unbind(1)]
    return window.sums(grid).view(channels, -1, *window.sides).transpose(0, 1)
