"""Batch norm behind concatenations, in graphs that are going to be compiled.

Every layer of a DenseNet (Huang et al. 2017, section 3) normalises all channels of the layers before it.
But a channel's mean and deviation are its own, whatever it is concatenated with: so each is normalised
once here, and every layer scales what it is given of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from dlgbench.batchnorm import BatchNorm2d, normalised
from dlgbench.bilinear import kept


def run(body: nn.Module, features: Tensor) -> Any:
    """``body(features)``; where a graph of it is being traced, with every channel normalised once."""
    traced = get_proxy_mode() is not None
    return _Sharing(body).run(features) if traced and isinstance(body, fx.GraphModule) else body(features)


class _Sharing(fx.Interpreter):
    """All batch norms behind concatenations scale the same normalised features."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__(body)
        # of all concatenations (held, or others would get their ids): what they are of, and its state then
        self._parts: dict[object, tuple[Tensor, Sequence[Tensor], object]] = {}
        self._normal: dict[object, Tensor] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_function(target, args, kwargs)
        if target is torch.cat and [*args[1:], *kwargs.values()] == [1]:
            self._parts[_state([output])] = output, args[0], _state(args[0])
        return output

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if type(layer) is BatchNorm2d:
            _, parts, before = self._parts.get(_state(args), (None, (), None))
            if before == _state(parts):
                return layer.scaled(self._normalised(parts, layer.eps))
        return super().call_module(target, args, kwargs)

    def _normalised(self, parts: Sequence[Tensor], eps: float) -> Tensor:
        key = eps, _state(parts)
        if key not in self._normal and len(parts) == 1:
            self._normal[key] = normalised(parts[0], eps)
        elif key not in self._normal:
            first, second = (self._normalised(some, eps) for some in (parts[:-1], parts[-1:]))
            self._normal[key] = joined(first, second)
        return self._normal[key]


def _state(tensors: Sequence[Tensor]) -> object:
    """Equal for the same tensors until one is written to."""
    return tuple((id(tensor), tensor._version) for tensor in tensors)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """The channels of both, with derivatives that are joined and split like them."""
    output: Tensor = _Joined.apply(first, second)
    return output


class _Joined(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second), 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.size = inputs[0].shape[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        parts: tuple[Tensor, Tensor] = _Split.apply(gradient, ctx.size)
        return parts


class _Split(torch.autograd.Function):
    """The whole is summed up here, or all its summands would wait for who needs it; and the second part is in
    memory of its own, or who needs that later would keep the whole."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
        whole = _kept(values)
        return whole[:, :size].clone(), _kept(whole[:, size:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None]:
        return joined(first, second), None


def _kept(images: Tensor) -> Tensor:
    """With channels innermost in memory."""
    return kept(images.movedim(1, -1)).movedim(-1, 1)
