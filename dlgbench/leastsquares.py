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
    return _solve(*_scaled(matrix, wanted))


def solve_nonnegative(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The same without negative entries: those that the plain solution has become zeros.

    By block principal pivoting (Kim and Park 2011, "Fast nonnegative matrix factorization: an
    active-set-like method and comparisons", algorithm 2): a set of entries is free, the others are 0,
    and entries that violate the conditions of optimality change sides until there are none.
    """
    matrix, wanted = _scaled(matrix, wanted)
    free = torch.ones_like(matrix[0], dtype=torch.bool)
    fewest, patience = len(free) + 1, PATIENCE
    found = torch.zeros_like(matrix[0])
    for _ in range(PIVOTS):
        found = torch.zeros_like(found).masked_scatter(free, _solve(matrix[:, free], wanted))
        pull = matrix.T @ (wanted - matrix @ found)
        wrong = torch.where(free, _negative(found), _negative(-pull, (matrix.T @ wanted).abs().max()))
        count = int(wrong.sum())
        if count == 0:
            break
        fewest, patience = (count, PATIENCE) if count < fewest else (fewest, patience - 1)
        free ^= wrong if patience >= 0 else _last(wrong)
    return found.clamp_min(0)


def _negative(values: Tensor, unit: Tensor | None = None) -> Tensor:
    return values < -TOLERANCE * (values.abs().max() if unit is None else unit)


def _last(chosen: Tensor) -> Tensor:
    last = torch.zeros_like(chosen)
    last[chosen.nonzero()[-1]] = True
    return last


def _scaled(matrix: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    sizes = matrix.norm(dim=1).clamp_min(torch.finfo(matrix.dtype).tiny)
    return matrix / sizes[:, None], wanted / sizes


def _solve(matrix: Tensor, wanted: Tensor) -> Tensor:
    gram = matrix.T @ matrix
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    factor, fault = torch.linalg.cholesky_ex(gram)
    found = matrix.new_full(matrix.shape[1:], torch.nan if fault else 0)
    for _ in range(1 + REFINEMENTS):
        rest = matrix.T @ (wanted - matrix @ found)
        found += torch.cholesky_solve(rest[:, None], factor)[:, 0]
    return found
