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
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        output: Tensor = _Normalise.apply(features, weight, bias, self.eps)[0]
        return output


class SharedBatchNorm2d(BatchNorm2d):
    """The same, of a client that shares its batch's statistics: buffers ``batch_mean`` and ``batch_var``."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__(layer)
        for name in ("batch_mean", "batch_var"):
            self.register_buffer(name, torch.zeros_like(layer.bias.detach()), persistent=False)


# Notation: x features, w weight, r = 1 / sqrt(var + eps), h = (x - mean) r, y = w h + b; g the gradient
# of y.  With P v = v - mean(v) - h mean(h v), which is symmetric and maps to what r P does to h:
#   dx = w r P g      dw = sum(g h)      db = sum(g)            (Ioffe and Szegedy 2015, section 3)


class _Normalise(torch.autograd.Function):
    """x, w, b, eps → y, h, r."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        centred = x - kept(_total(x) / count)
        r = kept((_total(centred * centred) / count + eps).rsqrt())
        h = centred * r
        return h * w + b, h, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, w, h, r = ctx.saved_tensors
        return *_Gradient.apply(g, x, w, h, r), None


class _Gradient(torch.autograd.Function):
    """g, x, w, h, r → dx, dw, db; of h and r, which x determines, the derivative is in that of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, w: Tensor, h: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        dw, db = _total(g * h), _total(g)
        scale = kept(w * r)
        return g * scale - h * kept(scale * dw / count) - kept(scale * db / count), dw, db

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, u: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of u.dx + a.dw + b.db in g, x and w.

        In g it is w r P u + a h + b.  In x: dx = w r (g - db/n - h dw/n) depends on x by r, whose
        gradient is -r^2 h / n, and by h, whose gradient along v is r P v; so does dw, by h.
        """
        g, x, w, h, r, dw, db = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        mean_u, mean_hu = _total(u) / count, _total(h * u) / count
        in_w = r * (_total(g * u) - db * mean_u - dw * mean_hu)
        scale = kept(w * r)
        along_h = kept(a - scale * mean_hu)
        in_g = u * scale + h * along_h + kept(b - scale * mean_u)
        of_g, of_u = kept(r * along_h), kept(-r * scale * dw / count)
        of_h = kept(-(scale * in_w + of_g * dw) / count - of_u * mean_hu)
        in_x = g * of_g + u * of_u + h * of_h - kept(of_g * db / count + of_u * mean_u)
        return in_g, in_x, in_w, None, None


def _total(values: Tensor) -> Tensor:
    """Along rows first: inductor makes faster code of it than of a sum over all three at once.

    Measured on DenseNet-121, with all coefficients per channel `kept`: 326 instead of 348 ms a closure.
    """
    return values.sum(3, keepdim=True).sum(DIMENSIONS, keepdim=True)
