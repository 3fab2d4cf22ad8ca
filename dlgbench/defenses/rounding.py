"""Fewer bits a number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dlgbench.defenses.base import Defense, Tensors
from dlgbench.registry import DEFENSES

LEVELS = 127
"""Of int8 on either side of 0."""
SOFTNESS = 0.1
"""How far from 0, in root mean squares, an attacker's sign is halfway: a sign has no derivative."""
UNIFORM = 1 / math.sqrt(12)
"""The standard deviation of what is rounded away, in units of the spacing."""


@dataclass(frozen=True)
class _Cast(Defense):
    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        most = torch.finfo(self.format).max
        return {name: g.clamp(-most, most).to(self.format).to(g.dtype) for name, g in gradients.items()}

    def doubt(self, shared: Tensors) -> Tensors:
        facts = torch.finfo(self.format)

        def spacing(value: Tensor) -> Tensor:  # below the smallest normal number it is as it is there
            return facts.eps * value.abs().clamp_min(facts.smallest_normal).log2().floor().exp2()

        return {name: UNIFORM * spacing(gradient) for name, gradient in shared.items()}

    @property
    def format(self) -> torch.dtype:
        raise NotImplementedError


@DEFENSES.register("fp16")
@dataclass(frozen=True)
class Half(_Cast):
    """Half precision, IEEE 754 binary16 (Zhu et al. 2019, section 5.1)."""

    @property
    def format(self) -> torch.dtype:
        return torch.float16


@DEFENSES.register("bf16")
@dataclass(frozen=True)
class BrainFloat(_Cast):
    """Brain floating point: float32's range with 8 bits of precision."""

    @property
    def format(self) -> torch.dtype:
        return torch.bfloat16


@DEFENSES.register("int8")
@dataclass(frozen=True)
class Int8(Defense):
    """255 levels a tensor, evenly from minus to plus its largest magnitude, rounded to the nearest."""

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return {name: _rounded(gradient) for name, gradient in gradients.items()}

    def doubt(self, shared: Tensors) -> Tensors:
        return {name: UNIFORM * gradient.abs().amax() / LEVELS for name, gradient in shared.items()}


@DEFENSES.register("sign")
@dataclass(frozen=True)
class Sign(Defense):
    """Nothing but signs (Bernstein et al. 2018, "signSGD", algorithm 1)."""

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        return {name: gradient.sign() for name, gradient in gradients.items()}

    def expected(self, ours: Tensors, shared: Tensors) -> Tensors:
        return {name: _soft_sign(gradient) for name, gradient in ours.items()}

    def doubt(self, shared: Tensors) -> Tensors:
        return {name: gradient.new_tensor(SOFTNESS) for name, gradient in shared.items()}


def _rounded(gradient: Tensor) -> Tensor:
    spacing = gradient.abs().amax() / LEVELS
    return torch.where(spacing > 0, (gradient / spacing).round() * spacing, gradient)


def _soft_sign(gradient: Tensor) -> Tensor:
    squares = gradient.square()
    return gradient / (squares + SOFTNESS**2 * squares.mean() + torch.finfo(gradient.dtype).tiny).sqrt()
