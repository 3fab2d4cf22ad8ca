"""Batch norm on batch statistics, in graphs with second derivatives as cheap as the first.

PyTorch's own derivative of its batch norm's derivative is a chain of some 150 operations a layer;
worked out by hand it is 30, which is what makes it possible to compile a network like DenseNet-121
(121 such layers) as a whole.  Not compiled, PyTorch's is faster: it is one call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from dlgbench.bilinear import kept

DIMENSIONS = (0, 2, 3)


class BatchNorm2d(nn.Module):
    """``nn.BatchNorm2d`` in train mode without running statistics: it takes that layer's parameters."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps

    def forward(self, features: Tensor) -> Tensor:
        """Of ``(image, channel, height, width)``: PyTorch's own, unless a graph of it is being traced.

        Raises ValueError for a single value per channel.
        """
        if get_proxy_mode() is None:
            return F.batch_norm(features, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return self.scaled(normalised(features, self.eps))

    def scaled(self, normal: Tensor) -> Tensor:
        """What it makes of features that are `normalised`."""
        output: Tensor = _Scaled.apply(normal, self.weight[:, None, None], self.bias[:, None, None])
        return output


class SharedBatchNorm2d(BatchNorm2d):
    """The same, of a client that shares its batch's statistics: buffers ``batch_mean`` and ``batch_var``."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__(layer)
        for name in ("batch_mean", "batch_var"):
            self.register_buffer(name, torch.zeros_like(layer.bias.detach()), persistent=False)


def normalised(features: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` of every channel of ``(image, channel, height, width)``."""
    output: Tensor = _Normalised.apply(features, eps)[0]
    return output


# Notation: x features, r = 1 / sqrt(var + eps), h = (x - mean) r; g the gradient of h.  With
# P v = v - mean(v) - h mean(h v), which is symmetric and maps to what r P does to h:
#   dx = r P g                                                  (Ioffe and Szegedy 2015, section 3)


class _Normalised(torch.autograd.Function):
    """x, eps → h, r"""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        centred = x - kept(_mean(x))
        r = kept((_mean(centred * centred) + eps).rsqrt())
        return centred * r, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor, unused: Tensor) -> tuple[Tensor, None]:
        return _Gradient.apply(g, *ctx.saved_tensors), None


class _Gradient(torch.autograd.Function):
    """g, x, h, r → dx; of h and r, which x determines, the derivative is in that of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, h: Tensor, r: Tensor) -> Tensor:
        return g * r - h * kept(r * _mean(g * h)) - kept(r * _mean(g))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        g, _, *others = inputs
        ctx.save_for_backward(g, *others)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of u.dx in g and x.

        In g it is r P u.  In x: dx depends on x by r, whose gradient is -r^2 h / n, and by h, whose gradient
        along v is r P v.
        """
        g, h, r = ctx.saved_tensors
        square, mean_g, mean_hg, mean_u, mean_hu = r * r, _mean(g), _mean(h * g), _mean(u), _mean(h * u)
        in_g = u * r - h * kept(r * mean_hu) - kept(r * mean_u)
        of_h = kept(square * (mean_g * mean_u + 3 * mean_hg * mean_hu - _mean(g * u)))
        in_x = h * of_h - u * kept(square * mean_hg) - g * kept(square * mean_hu)
        return in_g, in_x + kept(square * (mean_u * mean_hg + mean_g * mean_hu)), None, None


class _Scaled(torch.autograd.Function):
    """h, w, b → y = h w + b"""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return h * w + b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _ScaledGradient.apply(g, *ctx.saved_tensors)
        return gradients


class _ScaledGradient(torch.autograd.Function):
    """The gradient g of y, h, w → dh, dw, db"""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return g * w, _total(g * h)[0], _total(g)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """The gradient of u.dh + a.dw + b.db in g, h and w."""
        g, h, w = ctx.saved_tensors
        return u * w + h * a + b, g * a, _total(g * u)[0]


def _mean(values: Tensor) -> Tensor:
    return _total(values) / (values.numel() // values.shape[1])


def _total(values: Tensor) -> Tensor:
    """Along rows first: inductor makes faster code of it than of a sum over all three at once.

    Measured on DenseNet-121, with all coefficients per channel `kept`: 326 instead of 348 ms a closure.
    """
    return values.sum(3, keepdim=True).sum(DIMENSIONS, keepdim=True)
