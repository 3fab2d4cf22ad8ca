"""What the input of a convolution solves, once the layer's output and the loss's gradient there are known."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgbench.convolution import Conv2d


class Equations:
    """Linear equations of one image, every one in units of its own size (the norm of its coefficients).

    Those of the known entries of the output come first, ``(output channel, place)``, then those of the
    weight's gradient, ``(output channel, input channel, tap)``, alike for every input channel.  They are
    never written out: the former are 0 but for what a place sees, the latter but for one channel.
    """

    def __init__(
        self, layer: Conv2d, weight: Tensor, shape: torch.Size, known: Tensor, slope: Tensor
    ) -> None:
        """``shape`` is the input's; ``known`` and ``slope`` are ``(output channel, height, width)``."""
        self.channels, self.weight, self.known = shape[0], weight.flatten(1), known.flatten(1)
        numbers = torch.arange(1, shape.numel() + 1).to(weight).view(1, *shape)
        padding = cast(tuple[int, int], layer.padding)
        self.seen = F.unfold(numbers, layer.kernel_size, padding=padding, stride=layer.stride)[0].long()
        """Which inputs a place sees, counted from 1; 0 is outside the image. ``(channel tap, place)``"""
        taps = _taps(self.seen[: weight[0, 0].numel()], slope.flatten(1), shape[1:].numel())
        tiny = torch.finfo(weight.dtype).tiny
        ahead = (self.weight.square() @ (self.seen > 0).to(weight)).sqrt().clamp_min(tiny)
        alike = taps.norm(dim=2).clamp_min(tiny)
        self.scale, self.taps = torch.where(self.known, 1 / ahead, 0), taps / alike[:, :, None]
        self.sizes = self._sides(ahead, alike[:, None].expand(-1, self.channels, -1))

    def wanted(self, output: Tensor, gradient: Tensor) -> Tensor:
        """The right sides: of the output less its bias, and of the weight's gradient."""
        return self._sides(output.flatten(1), gradient.flatten(2)) / self.sizes

    def times(self, values: Tensor) -> Tensor:
        """The left sides for an input, flattened."""
        ahead = self.scale * (self.weight @ F.pad(values, (1, 0))[self.seen])
        alike = torch.einsum("otp,cp->oct", self.taps, values.view(self.channels, -1))
        return self._sides(ahead, alike)

    def transposed(self, sides: Tensor) -> Tensor:
        """The transpose of that."""
        ahead, alike = sides.tensor_split([int(self.known.sum())])
        places = torch.zeros_like(self.scale).masked_scatter(self.known, ahead) * self.scale
        alike = alike.view(len(self.weight), self.channels, -1)
        values = F.pad(torch.einsum("otp,oct->cp", self.taps, alike).flatten(), (1, 0))
        values.index_add_(0, self.seen.flatten(), (self.weight.T @ places).flatten())
        return values[1:]

    def gram(self) -> Tensor:
        """The matrix of ``transposed(times(...))``."""
        side = self.channels, self.taps.shape[2]
        gram = self.weight.new_zeros(*side, *side)
        planes, alike = gram.diagonal(dim1=0, dim2=2), self.taps.flatten(0, 1)
        planes += (alike.T @ alike)[:, :, None]
        gram = gram.flatten(2).flatten(0, 1)
        for seen, scale in zip(self.seen.T, self.scale.T, strict=True):
            rows, inside = (scale[:, None] * self.weight)[:, seen > 0], seen[seen > 0] - 1
            gram[inside[:, None], inside] += rows.T @ rows
        return gram

    def misfit(self, values: Tensor, wanted: Tensor) -> Tensor:
        """How far the equations are from being met, relatively, all in the same units."""
        missed: Tensor = torch.linalg.vector_norm((self.times(values) - wanted) * self.sizes)
        whole: Tensor = torch.linalg.vector_norm(wanted * self.sizes)
        return missed / whole

    def _sides(self, ahead: Tensor, alike: Tensor) -> Tensor:
        return torch.cat([ahead[self.known], alike.flatten()])


def _taps(seen: Tensor, slope: Tensor, pixels: int) -> Tensor:
    """How every tap's gradient depends on the pixels of a plane, ``(output channel, tap, pixel)``."""
    shape = len(slope), *seen.shape
    taps = slope.new_zeros(*shape[:2], pixels + 1)
    return taps.scatter(2, seen.expand(shape), slope[:, None].expand(shape))[..., 1:]
