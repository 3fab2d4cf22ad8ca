"""Fewer bits a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dlgbench.defenses.base import UNIFORM, GradientDefense, Tensors
from dlgbench.registry import DEFENSES

LEVELS = 127
"""Of int8 on either side of 0."""
SOFTNESS = 0.1
"""How far from 0, in root mean squares, an attacker's sign is halfway: a sign has no derivative."""


@dataclass(frozen=True)
class _Cast(GradientDefense):
    format: ClassVar[torch.dtype]
    """In which numbers are sent."""

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        most = torch.finfo(self.format).max
        return {name: g.clamp(-most, most).to(self.format).to(g.dtype) for name, g in gradients.items()}

    def doubt(self, shared: Tensors, batch: int) -> Tensors:
        facts = torch.finfo(self.format)

        def spacing(value: Tensor) -> Tensor:  # below the smallest normal number it is as it is there
            return facts.eps * value.abs().clamp_min(facts.smallest_normal).log2().floor().exp2()

        return {name: UNIFORM * spacing(gradient) for name, gradient in shared.items()}

    def size(self, shared: Tensors) -> int:
        return sum(gradient.numel() * self.format.itemsize for gradient in shared.values())


@DEFENSES.register("fp16")
@dataclass(frozen=True)
class Half(_Cast):
    """Half precision, IEEE 754 binary16 (Zhu et al. 2019, section 5.1)."""

    format = torch.float16


@DEFENSES.register("bf16")
@dataclass(frozen=True)
class BrainFloat(_Cast):
    """Brain floating point: float32's range with 8 bits of precision."""

    format = torch.bfloat16


@DEFENSES.register("int8")
@dataclass(frozen=True)
class Int8(GradientDefense):
    """255 levels a tensor, evenly from minus to plus its largest magnitude, rounded to the nearest."""

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return {name: _rounded(gradient) for name, gradient in gradients.items()}

    def doubt(self, shared: Tensors, batch: int) -> Tensors:
        return {name: UNIFORM * gradient.abs().amax() / LEVELS for name, gradient in shared.items()}

    def size(self, shared: Tensors) -> int:
        """A byte an entry, and the spacing of every tensor."""
        return sum(gradient.numel() + gradient.itemsize for gradient in shared.values())


@DEFENSES.register("sign")
@dataclass(frozen=True)
class Sign(GradientDefense):
    """Nothing but signs (Bernstein et al. 2018, "signSGD", algorithm 1)."""

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return {name: gradient.sign() for name, gradient in gradients.items()}

    def foreseen(self, ours: Tensors, shared: Tensors) -> Tensors:
        return {name: _soft_sign(gradient) for name, gradient in ours.items()}

    def doubt(self, shared: Tensors, batch: int) -> Tensors:
        return {name: gradient.new_tensor(SOFTNESS) for name, gradient in shared.items()}

    def size(self, shared: Tensors) -> int:
        """A bit an entry."""
        return sum(-(-gradient.numel() // 8) for gradient in shared.values())


def _rounded(gradient: Tensor) -> Tensor:
    spacing = gradient.abs().amax() / LEVELS
    return torch.where(spacing > 0, (gradient / spacing).round() * spacing, gradient)


def _soft_sign(gradient: Tensor) -> Tensor:
    squares = gradient.square()
    return gradient / (squares + SOFTNESS**2 * squares.mean() + torch.finfo(gradient.dtype).tiny).sqrt()
