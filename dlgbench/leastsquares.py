"""Dense linear least squares in float64, plain and without negative entries."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING, REFINEMENTS = 1e-11, 4
"""Tikhonov's term, in units of the mean eigenvalue, and steps of iterative refinement that undo it."""
TOLERANCE = 1e-8
"""What counts as 0 in the optimality conditions, in units of the largest entry."""
PIVOTS, PATIENCE = 100, 3
"""Exchanges at most, and how many whole ones may fail to help before single ones are made."""


def solve(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The solution of least norm of ``matrix @ x = wanted``, every equation in units of its own size.

    NaN where there is none, as for equations of zeros.
    """
    matrix, wanted = _scaled(matrix, wanted)
    return _solve(matrix, matrix.T @ matrix, wanted)


def solve_nonnegative(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The same without negative entries: those that the plain solution has become zeros.

    By block principal pivoting (Kim and Park 2011, "Fast nonnegative matrix factorization: an
    active-set-like method and comparisons", algorithm 2): a set of entries is free, the others are 0,
    and entries that violate the conditions of optimality change sides until there are none.
    """
    matrix, wanted = _scaled(matrix, wanted)
    gram, zeros = matrix.T @ matrix, torch.zeros_like(matrix[0])
    least = TOLERANCE * (matrix.T @ wanted).abs().max()
    free = torch.ones_like(zeros, dtype=torch.bool)
    fewest, patience = len(free) + 1, PATIENCE
    for _ in range(PIVOTS):
        found = zeros.masked_scatter(free, _solve(matrix[:, free], gram[free][:, free], wanted))
        pull = matrix.T @ (wanted - matrix @ found)
        wrong = torch.where(free, found < -TOLERANCE * found.abs().max(), pull > least)
        count = int(wrong.sum())
        if count == 0:
            break
        fewest, patience = (count, PATIENCE) if count < fewest else (fewest, patience - 1)
        free ^= wrong if patience >= 0 else _last(wrong)
    return found.clamp_min(0)


def _last(chosen: Tensor) -> Tensor:
    last = torch.zeros_like(chosen)
    last[chosen.nonzero()[-1]] = True
    return last


def _scaled(matrix: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    sizes = matrix.norm(dim=1).clamp_min(torch.finfo(matrix.dtype).tiny)
    return matrix / sizes[:, None], wanted / sizes


def _solve(matrix: Tensor, gram: Tensor, wanted: Tensor) -> Tensor:
    damped = gram + torch.diag_embed(DAMPING * gram.diagonal().mean().expand(len(gram)))
    factor, fault = torch.linalg.cholesky_ex(damped)
    found = matrix.new_full(matrix.shape[1:], torch.nan if fault else 0)
    for _ in range(1 + REFINEMENTS):
        rest = matrix.T @ (wanted - matrix @ found)
        found += torch.cholesky_solve(rest[:, None], factor)[:, 0]
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
