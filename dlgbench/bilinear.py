"""Linear maps and products whose derivatives, first and second, are maps and products like themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ab": lambda a, b: a @ b,
    "abT": lambda a, b: a @ b.mT,
    "aTb": lambda a, b: a.mT @ b,
}


def linear(values: Tensor, function: Map, transpose: Map) -> Tensor:
    """``function(values)``, a linear map that is differentiated by its transpose."""
    output: Tensor = _Linear.apply(values, function, transpose)
    return output


def product(a: Tensor, b: Tensor, form: str) -> Tensor:
    """One of `FORMS` of two (stacks of) matrices.

    Its derivatives lie in memory row after row.  Of PyTorch's own some would be transposed, and every
    element of them fetched from a line of memory of its own.
    """
    output: Tensor = _Product.apply(a, b, form)
    return output


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
    def forward(a: Tensor, b: Tensor, form: str) -> Tensor:
        return FORMS[form](a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.form = inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        in_a, in_b = {
            "ab": ((g, b, "abT"), (a, g, "aTb")),
            "abT": ((g, b, "ab"), (g, a, "aTb")),
            "aTb": ((b, g, "abT"), (a, g, "ab")),
        }[ctx.form]
        return product(*in_a), product(*in_b), None
