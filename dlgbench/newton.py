"""Gauss-Newton on the few pixels of a small image: what no single layer's equations determine, all do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.func import functional_call, grad, jvp, vmap

from dlgbench.leak import Tensors
from dlgbench.spectrum import Spectrum

LARGEST = 1024
"""Unknowns: the Jacobian is written out, a quarter of a second an iteration on two CPU cores."""
PRIOR, FALL = 1e-2, 0.25
"""The weight of the unknowns' squares at first, and what is left of it whenever it falls.  Measured on
trained lenet5, as all here: docs/tried.md."""
HALVINGS, SETTLED = 12, 0.95
"""Of a step that does not lower what is minimised, at most; one that was halved and leaves more than this
share of it is not worth another."""
ITERATIONS, STALLED = 60, 0.9
"""It ends when three falls together leave more than this share of the squared residual."""
CHUNK = 128
"""Columns of the Jacobian that are computed at once."""


class Segment(NamedTuple):
    """The lowest layers of a network and what is known of them, all in float64."""

    trunk: fx.GraphModule
    """Gives a tuple of one."""
    weights: Tensors
    """The trunk's, by its own names."""
    gradients: Tensors
    """Those of the loss in these weights, as leaked."""
    features: Tensor
    """What the trunk gives on the private image."""
    slope: Tensor
    """The loss's gradient in the features."""

    def residual(self, images: Tensor) -> Tensor:
        """What ``images`` leave of the features and every gradient, each in units of its size: a vector."""

        def loss(weights: Tensors) -> tuple[Tensor, Tensor]:
            outputs = functional_call(self.trunk, weights, (images,))[0].flatten()
            return (outputs * self.slope.flatten()).sum(), outputs

        ours, outputs = grad(loss, has_aux=True)(self.weights)
        ahead = (outputs - self.features.flatten()) / (self.features - self.features.mean()).norm()
        apart = (((ours[name] - theirs) / theirs.norm()).flatten() for name, theirs in self.gradients.items())
        return torch.cat([ahead, *apart])


def solve(segment: Segment, shape: tuple[int, ...]) -> Tensor:
    """The image, shaped ``shape``, of which a segment's features and gradients are; over frequencies."""
    spectrum = Spectrum(shape[-3:], segment.slope)

    def images(unknown: Tensor) -> Tensor:
        return 0.5 + spectrum.images(unknown.view(shape))

    start = torch.zeros(math.prod(shape)).to(segment.slope)
    return images(gauss_newton(lambda unknown: segment.residual(images(unknown)), start))


def gauss_newton(residual: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """A minimum of ``|residual|^2``, come to from ``start`` on a path along which a prior fades.

    Iteratively regularised (Bakushinskii 1992, "The problem of the convergence of the iteratively
    regularized Gauss-Newton method"): every iteration adds ``prior |unknown|^2`` and goes as far as lowers
    the sum.  The prior falls where it went all the way, or gained little.  The Jacobian is dense, in
    forward mode.
    """
    unknown, rest, prior = start, residual(start), PRIOR
    values = [float(rest.square().sum())]
    directions = torch.eye(len(start)).to(start)
    for _ in range(ITERATIONS):
        jacobian = _jacobian(residual, unknown, directions)
        factor, fault = torch.linalg.cholesky_ex(jacobian.T @ jacobian + prior * directions)
        slope = jacobian.T @ rest + prior * unknown
        step = torch.cholesky_solve(slope[:, None], factor)[:, 0]
        found = None if fault else _shortened(residual, unknown, rest, step, prior)
        if found is None:
            break
        unknown, rest, settled = found
        if not settled:
            continue
        prior *= FALL
        values.append(float(rest.square().sum()))
        if len(values) > 3 and values[-1] > STALLED * values[-4]:
            break
    return unknown


def _shortened(
    residual: Callable[[Tensor], Tensor], unknown: Tensor, rest: Tensor, step: Tensor, prior: float
) -> tuple[Tensor, Tensor, bool] | None:
    """Where ``step``, halved until it does, lowers the regularised square, the residual there, and whether
    nothing is to be gained by another with the same prior."""
    before = rest.square().sum() + prior * unknown.square().sum()
    for halving in range(HALVINGS):
        new = unknown - 0.5**halving * step
        there = residual(new)
        after = there.square().sum() + prior * new.square().sum()
        if after < before:
            return new, there, halving == 0 or bool(after > SETTLED * before)
    return None


def _jacobian(residual: Callable[[Tensor], Tensor], where: Tensor, directions: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch's own forward mode uses what torch has deprecated
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        columns: Tensor = vmap(lambda v: jvp(residual, (where,), (v,))[1], chunk_size=CHUNK)(directions)
    return columns.T
