"""Least squares against numpy's and scipy's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from dlgbench import leastsquares
from dlgbench.leastsquares import solve_determined


class Dense(NamedTuple):
    """A linear map that is written out."""

    matrix: Tensor

    def times(self, values: Tensor) -> Tensor:
        return self.matrix @ values

    def transposed(self, sides: Tensor) -> Tensor:
        return self.matrix.T @ sides

    def gram(self) -> Tensor:
        return self.matrix.T @ self.matrix


def solve(matrix: Tensor, wanted: Tensor, root: Tensor | None = None) -> Tensor:
    """Least by the norm of what ``root`` makes the solution of."""
    root = torch.eye(matrix.shape[1], dtype=matrix.dtype) if root is None else root
    precision = torch.linalg.inv(root @ root.T)
    return leastsquares.solve(Dense(matrix), wanted, root @ root.T, precision)


def solve_nonnegative(matrix: Tensor, wanted: Tensor) -> Tensor:
    found = leastsquares.solve_nonnegative(Dense(matrix), wanted)
    assert found is not None
    return found


def system(seed: int, equations: int, unknowns: int, share: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Equations with rows of size 1, a right side that they can meet, and the solution it was made of."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(equations, unknowns, generator=generator, dtype=torch.float64)
    matrix /= matrix.norm(dim=1, keepdim=True)
    truth = torch.rand(unknowns, generator=generator, dtype=torch.float64)
    truth[torch.rand(unknowns, generator=generator) > share] = 0
    return matrix, matrix @ truth, truth


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 30))
def test_plain_solutions_are_those_of_least_norm(seed: int, equations: int, unknowns: int) -> None:
    matrix, wanted, _ = system(seed, equations, unknowns)
    assume(np.linalg.cond(matrix.numpy()) < 1e3)
    theirs, *_ = np.linalg.lstsq(matrix.numpy(), wanted.numpy(), rcond=None)
    # rounding, 2e-16, divided by the damping of what no equation determines, 1e-11
    np.testing.assert_allclose(solve(matrix, wanted), theirs, atol=2e-5 * unknowns)


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 20))
def test_what_is_least_can_be_chosen(seed: int, equations: int, unknowns: int) -> None:
    """The solution of least norm in other coordinates."""
    matrix, wanted, _ = system(seed, equations, unknowns)
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(unknowns, unknowns, generator=generator, dtype=torch.float64)
    root += 4 * unknowns**0.5 * torch.eye(unknowns)
    assume(np.linalg.cond((matrix @ root).numpy()) < 1e3)
    theirs, *_ = np.linalg.lstsq((matrix @ root).numpy(), wanted.numpy(), rcond=None)
    np.testing.assert_allclose(solve(matrix, wanted, root), root.numpy() @ theirs, atol=2e-5 * unknowns)


@given(st.integers(0, 1000), st.integers(20, 40), st.integers(1, 20))
def test_solutions_without_negative_entries_are_scipys(seed: int, equations: int, unknowns: int) -> None:
    matrix, _, _ = system(seed, equations, unknowns)
    wanted = torch.randn(equations, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theirs, _ = nnls(matrix.numpy(), wanted.numpy())
    np.testing.assert_allclose(solve_nonnegative(matrix, wanted), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_zeros_make_up_for_missing_equations(seed: int) -> None:
    matrix, wanted, truth = system(seed, equations=120, unknowns=200, share=0.1)
    assert float((solve(matrix, wanted) - truth).norm() / truth.norm()) > 0.1
    assert float((solve_nonnegative(matrix, wanted) - truth).abs().max()) < 1e-6


def test_where_many_solutions_without_negative_entries_are_as_good_there_is_none() -> None:
    matrix, wanted, _ = system(0, equations=100, unknowns=120, share=0.8)
    assert leastsquares.solve_nonnegative(Dense(matrix), wanted) is None


def test_equations_of_zeros_have_no_solution() -> None:
    assert solve(torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)).isnan().all()


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 4))
def test_several_sides_are_solved_at_once(seed: int, unknowns: int, sides: int) -> None:
    matrix, _, _ = system(seed, 2 * unknowns, unknowns)
    assume(np.linalg.cond(matrix.numpy()) < 1e3)
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(2 * unknowns, sides, generator=generator, dtype=torch.float64)
    theirs, *_ = np.linalg.lstsq(matrix.numpy(), wanted.numpy(), rcond=None)
    found = solve_determined(matrix, wanted, 1e-7)
    assert found is not None
    np.testing.assert_allclose(found, theirs, rtol=1e-8, atol=1e-8)


def test_what_is_not_determined_is_not_solved() -> None:
    matrix, wanted, _ = system(0, equations=10, unknowns=11)
    assert solve_determined(matrix, wanted[:, None], 1e-7) is None
    matrix, wanted, _ = system(0, equations=20, unknowns=10)
    twice = torch.cat([matrix[:, :9], matrix[:, :1] + 1e-6 * matrix[:, 9:]], 1)  # hardly told apart
    assert solve_determined(matrix, wanted[:, None], 1e-7) is not None
    assert solve_determined(twice, wanted[:, None], 1e-7) is None
    assert solve_determined(matrix * torch.nan, wanted[:, None], 1e-7) is None
