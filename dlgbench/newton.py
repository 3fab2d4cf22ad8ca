"""Gauss-Newton on the few pixels of a small image: what no single layer's equations determine, all do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

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


def solve(
    trunk: fx.GraphModule,
    weights: Tensors,
    gradients: Tensors,
    features: Tensor,
    slope: Tensor,
    shape: tuple[int, ...],
) -> Tensor:
    """The image, shaped ``shape``, on which ``trunk`` gives ``features`` and the leaked gradients.

    ``slope`` is the loss's gradient in the features; ``weights`` and ``gradients`` are the trunk's, by
    its own names, all in float64.  Levenberg-Marquardt (Nocedal and Wright, "Numerical Optimization",
    section 10.3) from grey, over frequencies.
    """
    spectrum = Spectrum(shape[-3:], slope)
    misfit = residual_of(trunk, weights, gradients, features, slope)

    def images(unknown: Tensor) -> Tensor:
        return 0.5 + spectrum.images(unknown.view(shape))

    start = torch.zeros(math.prod(shape)).to(slope)
    return images(levenberg_marquardt(lambda unknown: misfit(images(unknown)), start))


def residual_of(
    trunk: fx.GraphModule, weights: Tensors, gradients: Tensors, features: Tensor, slope: Tensor
) -> Callable[[Tensor], Tensor]:
    """What images leave of ``features`` and of every gradient, each in units of its size, as one vector."""

    def residual(images: Tensor) -> Tensor:
        def loss(weights: Tensors) -> tuple[Tensor, Tensor]:
            outputs = functional_call(trunk, weights, (images,)).flatten()
            return (outputs * slope.flatten()).sum(), outputs

        ours, outputs = grad(loss, has_aux=True)(weights)
        ahead = (outputs - features.flatten()) / (features - features.mean()).norm()
        return torch.cat([ahead, *(((ours[n] - g) / g.norm()).flatten() for n, g in gradients.items())])

    return residual


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
