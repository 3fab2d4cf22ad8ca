"""Linear least squares in float64, plain and without negative entries."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

DAMPING, REFINEMENTS = 1e-11, 4
"""Tikhonov's term, in units of the mean eigenvalue, and steps of iterative refinement that undo it."""
TOLERANCE = 1e-8
"""What counts as 0 in the optimality conditions, in units of the largest entry."""
PATIENCE = 10
"""How many exchanges, one after another, may fail to help."""


class Linear(Protocol):
    """A linear map, whose rows have about the same size."""

    def times(self, values: Tensor) -> Tensor:
        """Of a vector of unknowns."""

    def transposed(self, sides: Tensor) -> Tensor:
        """The transpose of that."""

    def gram(self) -> Tensor:
        """The matrix of ``transposed(times(...))``."""


def solve(linear: Linear, wanted: Tensor, covariance: Tensor, precision: Tensor) -> Tensor:
    """The solution of ``linear.times(x) = wanted`` for which ``x @ precision @ x`` is least.

    ``covariance`` is the inverse of ``precision``.  NaN where there is none, as for equations of zeros.
    """
    gram = linear.gram()
    gram.add_(precision, alpha=DAMPING * float(torch.tensordot(gram, covariance)) / len(gram))
    everything = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    return _refined(linear, gram, wanted, everything)


def solve_nonnegative(linear: Linear, wanted: Tensor) -> Tensor | None:
    """The solution of least norm without negative entries: those that the plain one has become zeros.

    By block principal pivoting (Kim and Park 2011, "Fast nonnegative matrix factorization: an
    active-set-like method and comparisons", algorithm 2): a set of entries is free, the others are 0,
    and entries that violate the conditions of optimality change sides until there are none.  None where
    they go on changing, as they do where many solutions are about as good.
    """
    gram, pulls = linear.gram(), linear.transposed(wanted)
    least = TOLERANCE * pulls.abs().max()
    free = torch.ones_like(pulls, dtype=torch.bool)
    fewest, patience = len(free) + 1, PATIENCE
    while patience > 0:
        damped = gram[free][:, free]
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        found = _refined(linear, damped, wanted, free)
        pull = linear.transposed(wanted - linear.times(found))
        wrong = torch.where(free, found < -TOLERANCE * found.abs().max(), pull > least)
        count = int(wrong.sum())
        if count == 0:
            return found.clamp_min(0)
        fewest, patience = (count, PATIENCE) if count < fewest else (fewest, patience - 1)
        free ^= wrong
    return None


def _refined(linear: Linear, damped: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    """The solution whose entries are 0 but for those ``free``, of which ``damped`` is the Gram matrix."""
    factor, fault = torch.linalg.cholesky_ex(damped)
    found = torch.zeros_like(free, dtype=damped.dtype)
    found[free] = torch.nan if fault else 0.0
    for _ in range(1 + REFINEMENTS):
        rest = linear.transposed(wanted - linear.times(found))[free, None]
        half = torch.linalg.solve_triangular(factor, rest, upper=False)
        found[free] += torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, 0]
    return found


def solve_determined(matrix: Tensor, wanted: Tensor, least: float) -> Tensor | None:
    """The solutions of ``matrix @ x = wanted``, ``(unknown, side)``, for several right sides at once.

    None where a combination of unknowns is seen less than ``least`` times as well as the best seen
    (squared), as where there are fewer equations than unknowns, or where a number is not finite.
    """
    if not (matrix.isfinite().all() and wanted.isfinite().all()):
        return None
    seen, combinations = torch.linalg.eigh(matrix.T @ matrix)
    if len(matrix) < len(seen) or not seen[0] > least * seen[-1]:
        return None
    found = torch.zeros_like(matrix[0][:, None] * wanted[0])
    for _ in range(1 + REFINEMENTS):
        rest = matrix.T @ (wanted - matrix @ found)
        found += combinations @ (combinations.T @ rest / seen[:, None])
    return found
