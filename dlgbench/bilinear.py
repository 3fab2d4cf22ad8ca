"""Linear maps and products whose derivatives, first and second, are maps and products like themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
Pair = tuple[Map, Map]
"""A linear map and its transpose."""


def _same(values: Tensor) -> Tensor:
    return values


SAME: Pair = (_same, _same)


def linear(values: Tensor, function: Map, transpose: Map) -> Tensor:
    """``function(values)``, a linear map that is differentiated by its transpose."""
    output: Tensor = _Linear.apply(values, function, transpose)
    return output


def product(first: Tensor, second: Tensor, rows: Pair = SAME, wanted: str = "r") -> Tensor:
    """The gradient of a trilinear form in one of its arguments: such are convolutions and their derivatives.

    The form is the sum of all elements of P Qᵀ ∘ R, where ``rows`` maps p to the (stack of) matrices P.
    ``wanted`` is ``p``, ``q`` or ``r``; the other two are given in this order.

    P is worked out anew for every derivative, not kept: it may be many times as large as p.  And all
    derivatives lie in memory row after row: of PyTorch's own some would be transposed, and every element
    of them fetched from a line of memory of its own.
    """
    output: Tensor = _Product.apply(first, second, rows, wanted)
    return output


def kept(values: Tensor) -> Tensor:
    """The same in memory of its own: inductor works anything else out anew, or later, where it is used."""
    whole = values.contiguous()
    return whole.as_strided(whole.shape, whole.stride())


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, function: Map, transpose: Map) -> Tensor:
        return function(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Map, Map], output: Tensor) -> None:
        ctx.maps = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        function, transpose = ctx.maps
        return linear(gradient, transpose, function), None, None


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(first: Tensor, second: Tensor, rows: Pair, wanted: str) -> Tensor:
        if wanted == "p":
            return rows[1](second @ first)
        mapped = rows[0](first)
        return second.mT @ mapped if wanted == "q" else mapped @ second.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Pair, str], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.rows, ctx.wanted = inputs[2:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        first, second = ctx.saved_tensors
        given = "pqr".replace(ctx.wanted, "")
        value = {given[0]: first, given[1]: second, ctx.wanted: g}

        def gradient(name: str) -> Tensor:
            a, b = (value[other] for other in "pqr" if other != name)
            return product(a, b, ctx.rows, name)

        return gradient(given[0]), gradient(given[1]), None, None
