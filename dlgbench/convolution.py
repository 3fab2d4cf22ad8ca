"""Convolution as a product of matrices, for graphs in which every case has kernels of its own.

Under ``vmap`` PyTorch makes one grouped convolution of many small ones, for which neither oneDNN nor
cuDNN has fast code; a batched product of matrices is what both sides of this are best at.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode


class Conv2d(nn.Module):
    """``nn.Conv2d`` with one group, no dilation, and a square kernel no smaller than the stride.

    It takes that layer's parameters.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, features: Tensor) -> Tensor:
        """Of ``(image, channel, height, width)``: PyTorch's own, unless a graph of it is being traced."""
        if get_proxy_mode() is None:
            return F.conv2d(features, self.weight, self.bias, self.stride, self.padding)
        images, _, *sides = features.shape
        kernel, stride, padding = self.weight.shape[-1], int(self.stride[0]), int(self.padding[0])
        window = _Window(kernel, stride, padding, *sides)
        output: Tensor = self.weight.flatten(1) @ _Patches.apply(features, window)
        if self.bias is not None:
            output = output + self.bias[:, None]
        return output.view(-1, images, *window.output).transpose(0, 1)


class _Window(NamedTuple):
    """A square kernel that slides over images of ``height`` and ``width``."""

    kernel: int
    stride: int
    padding: int
    height: int
    width: int

    @property
    def output(self) -> tuple[int, int]:
        return self._places(self.height), self._places(self.width)

    def _places(self, side: int) -> int:
        return (side + 2 * self.padding - self.kernel) // self.stride + 1


class _Rearrangement(torch.autograd.Function):
    """A linear function that a window determines."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Window], output: Tensor) -> None:
        ctx.window = inputs[1]


class _Patches(_Rearrangement):
    """``(image, channel, height, width)`` → ``(channel kernel kernel, image height width)``."""

    @staticmethod
    def forward(images: Tensor, window: _Window) -> Tensor:
        kernel, stride, padding = window[:3]
        padded = F.pad(images, (padding,) * 4).contiguous()
        image, channel, row, column = padded.stride()
        views = padded.as_strided(  # a copy of this is the fastest code that inductor makes
            (images.shape[1], kernel, kernel, len(images), *window.output),
            (channel, row, column, image, stride * row, stride * column),
        )
        return views.reshape(images.shape[1] * kernel**2, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Images.apply(gradient, ctx.window), None


class _Images(_Rearrangement):
    """The transpose of `_Patches`: every pixel is the sum of its places in the patches."""

    @staticmethod
    def forward(patches: Tensor, window: _Window) -> Tensor:
        kernel, stride, padding, height, width = window
        rows, columns = window.output
        places = patches.view(patches.shape[0] // kernel**2, kernel, kernel, -1, rows, columns)
        # pixels i mod stride, j mod stride apart share no patch: each such set is a sum of shifted patches
        high, wide = (-(-(side + 2 * padding) // stride) for side in (height, width))
        sets = [
            [
                F.pad(places[:, i, j], (b, wide - columns - b, a, high - rows - a))
                for a, i in enumerate(range(down, kernel, stride))
                for b, j in enumerate(range(right, kernel, stride))
            ]
            for down in range(stride)
            for right in range(stride)
        ]
        sums = [reduce(torch.add, shifted) for shifted in sets]
        shape = stride, stride, *sums[0].shape
        padded = torch.stack(sums).view(shape).permute(3, 2, 4, 0, 5, 1).flatten(4).flatten(2, 3)
        return padded[:, :, padding : padding + height, padding : padding + width]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Patches.apply(gradient, ctx.window), None
