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
"""Unknowns: the Jacobian is written out, one second an iteration on two CPU cores."""
ITERATIONS, STALLED = 40, 0.9
"""It ends when three iterations together leave more than this share of the squared residual."""
CHUNK = 128
"""Columns of the Jacobian that are computed at once."""
LEAST = 1e-18
"""The least damping, in units of the normal matrix' mean eigenvalue."""


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
    """The image, shaped ``shape``, that a segment's features and gradients are of.

    By Levenberg-Marquardt (Nocedal and Wright, "Numerical Optimization", section 10.3) from grey, over
    frequencies.
    """
    spectrum = Spectrum(shape[-3:], segment.slope)

    def images(unknown: Tensor) -> Tensor:
        return 0.5 + spectrum.images(unknown.view(shape))

    start = torch.zeros(math.prod(shape)).to(segment.slope)
    return images(levenberg_marquardt(lambda unknown: segment.residual(images(unknown)), start))


def levenberg_marquardt(residual: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """A minimum of ``|residual|^2`` near ``start``, by the dense Jacobian in forward mode."""
    unknown, rest, damping = start, residual(start), 1e-3
    values = [float(rest.square().sum())]
    directions = torch.eye(len(start)).to(start)
    for _ in range(ITERATIONS):
        jacobian = _jacobian(residual, unknown, directions)
        gram, slope = jacobian.T @ jacobian, jacobian.T @ rest
        while damping < 1:
            damped = gram + damping * gram.diagonal().mean() * directions
            factor, fault = torch.linalg.cholesky_ex(damped)
            new = unknown - torch.cholesky_solve(slope[:, None], factor)[:, 0]
            there = residual(new)
            if not fault and float(there.square().sum()) < values[-1]:
                break
            damping *= 8
        else:
            break
        unknown, rest, damping = new, there, max(damping / 10, LEAST)
        values.append(float(rest.square().sum()))
        if len(values) > 3 and values[-1] > STALLED * values[-4]:
            break
    return unknown


def _jacobian(residual: Callable[[Tensor], Tensor], where: Tensor, directions: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch's own forward mode uses what torch has deprecated
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        columns: Tensor = vmap(lambda v: jvp(residual, (where,), (v,))[1], chunk_size=CHUNK)(directions)
    return columns.T
