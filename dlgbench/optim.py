"""L-BFGS on many problems at once: every leading row of the parameters is a problem of its own.

The algorithm and its constants are those of ``torch.optim.LBFGS``; the directions, `History`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dlgbench.errors import UsageError
from dlgbench.history import History
from dlgbench.linesearch import LineSearch, Point, Search


class _Values(NamedTuple):
    """The objective of every row, ``(row,)`` on the CPU, and its gradient, ``(row, number)``."""

    objective: Tensor
    gradient: Tensor


class LBFGS(torch.optim.Optimizer):
    """``torch.optim.LBFGS`` for every leading row of ``params``, each row as if it were alone.

    ``active``, ``(row,)`` booleans on the CPU, says which rows to optimise; while a step runs it is
    narrowed to the rows whose objective and gradient the next closure must give, and afterwards it
    is as before.  Where a ``line_search`` gives up, its row goes on by steepest descent.
    A pair (s, y) is remembered where s.y is above ``tolerance_curvature``, which torch
    holds at 1e-10: small objectives want 0.  ``line_search`` is one of dlgbench.linesearch; the other
    options are torch's.  A row whose objective is no longer finite stops where that happened.

    With n numbers in a row and m = ``history_size``, a row needs 2mn + O(m^2) numbers of memory, and
    an iteration O(mn + m^2) time: it reads the 2mn numbers of the history twice; of a history that is not
    yet full, only what there is.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        tolerance_curvature: float = 1e-10,
        history_size: int = 100,
        line_search: LineSearch | None = None,
        active: Tensor | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr})
        self._params: list[Tensor] = self.param_groups[0]["params"]
        counts = sorted({len(parameter) for parameter in self._params})
        if len(self.param_groups) != 1 or len(counts) != 1:
            raise UsageError(
                "L-BFGS: expected one group of parameters that have equally many rows, "
                f"got {len(self.param_groups)} groups with {counts} rows"
            )
        self.active = torch.ones(counts[0], dtype=torch.bool) if active is None else active
        self.max_iter = max_iter
        self.max_eval = max_iter * 5 // 4 if max_eval is None else max_eval
        self.tolerance_grad = tolerance_grad
        self.tolerance_change = tolerance_change
        self.line_search = line_search
        numbers = _flat(self._params)
        self._history = History(history_size, tolerance_curvature, numbers)
        self._direction, self._gradient = torch.zeros_like(numbers), torch.zeros_like(numbers)
        self._length = torch.zeros(counts[0], dtype=torch.float64)
        self._begun = torch.zeros(counts[0], dtype=torch.bool)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """At most ``max_iter`` iterations of every active row.

        ``closure`` gives the objective of every row, ``(row,)``, and sets the parameters' ``.grad``;
        what it gives for rows that are not active is ignored.  Returns its first answer.
        """
        answers: list[Tensor] = []

        def evaluate() -> _Values:
            with torch.enable_grad():
                answers.append(closure())
            gradients = [cast(Tensor, parameter.grad) for parameter in self._params]
            return _Values(answers[-1].detach().double().cpu(), _flat(gradients))

        running, evaluations = self.active.clone(), torch.ones(len(self.active), dtype=torch.long)
        stuck = torch.zeros_like(running)
        here = evaluate()
        self.active &= ~(_largest(here.gradient) <= self.tolerance_grad)
        for iteration in range(1, self.max_iter + 1):
            slope = self._advise(here)
            self.active &= ~(slope > -self.tolerance_change)
            if not self.active.any():
                break
            if self.line_search is not None:
                searches = self._searches(self.line_search, here, slope, evaluations)
                there, stuck = self._search(searches, here, evaluations, evaluate)
            elif iteration < self.max_iter:
                self._move(self._length)
                there = evaluate()
                evaluations += 1
            else:  # nobody needs the values there: the next step begins with them
                self._move(self._length)
                break
            self._stop(here, there, evaluations, stuck)
            here = there
        self.active.copy_(running)
        return answers[0]

    def moved(self, row: int) -> None:
        """Go on with ``row`` from where it has been moved to: no pair (s, y) is made across the move."""
        self._direction[row] = 0

    def _advise(self, here: _Values) -> Tensor:
        """Note the active rows' directions and first step lengths; returns the slopes, ``(row,)``."""
        slope = torch.zeros(len(self.active), dtype=torch.float64)
        rows = self.active.nonzero().squeeze(1)
        if len(rows) == 0:
            return slope
        gradient, old = here.gradient[rows], self._direction[rows]
        s = old * self._length[rows].to(old)[:, None]
        y = gradient - self._gradient[rows]
        direction = self._history.directions(rows.to(gradient.device), s, y, gradient)
        first = (1 / gradient.abs().sum(1)).clamp(max=1.0).double().cpu()
        rate = float(self.param_groups[0]["lr"])
        self._length[rows] = rate * torch.where(self._begun[rows], 1.0, first)
        self._begun[rows] = True
        self._direction[rows], self._gradient[rows] = direction, gradient
        slope[rows] = (gradient * direction).sum(1).double().cpu()
        return slope

    def _stop(self, here: _Values, there: _Values, evaluations: Tensor, stuck: Tensor) -> None:
        """Which rows have arrived: torch's conditions, and values that are no numbers."""
        moved = _largest(self._direction).double() * self._length.abs()
        unchanged = (there.objective - here.objective).abs() < self.tolerance_change
        self.active &= ~(
            (evaluations >= self.max_eval)
            | (_largest(there.gradient) <= self.tolerance_grad)
            | (~stuck & (unchanged | (moved <= self.tolerance_change)))
            | ~there.objective.isfinite()
        )

    def _move(self, length: Tensor) -> None:
        """Move the active rows by ``length``, ``(row,)``, along their directions."""
        active = self.active.to(self._direction.device)[:, None]
        move = torch.where(active, length.to(self._direction)[:, None] * self._direction, 0)
        sizes = [parameter[0].numel() for parameter in self._params]
        for parameter, part in zip(self._params, torch.split(move, sizes, 1), strict=True):
            parameter += part.view_as(parameter)

    def _search(
        self,
        searches: dict[int, Search],
        here: _Values,
        evaluations: Tensor,
        evaluate: Callable[[], _Values],
    ) -> tuple[_Values, Tensor]:
        """Search along every active row's line, all rows at once, and move to the points found.

        Returns the values there, and which rows found none: they forget what they know, or the next
        direction would be the same, and so would its search, to the end of the run.
        """
        moving, start = self.active.clone(), [parameter.clone() for parameter in self._params]
        objective, gradient = here.objective.clone(), here.gradient.clone()
        trial, stuck = self._length.clone(), torch.zeros_like(self.active)
        for row, search in searches.items():
            trial[row] = next(search)
        while self.active.any():
            self._move(trial)
            there = evaluate()
            for parameter, values in zip(self._params, start, strict=True):
                parameter.copy_(values)
            evaluations += self.active
            slopes = (there.gradient * self._direction).sum(1).tolist()
            for row in self.active.nonzero().squeeze(1).tolist():
                step, value = float(trial[row]), float(there.objective[row])
                try:
                    trial[row] = searches[row].send(Point(step, value, slopes[row], there.gradient[row]))
                except StopIteration as end:
                    self.active[row], stuck[row] = False, end.value is None
                    if end.value is None:
                        self._length[row] = 0.0
                        self._history.forget(row)
                    else:
                        self._length[row], objective[row], _, gradient[row] = end.value
        self.active.copy_(moving)
        self._move(self._length)
        return _Values(objective, gradient), stuck

    def _searches(
        self, search: LineSearch, here: _Values, slope: Tensor, evaluations: Tensor
    ) -> dict[int, Search]:
        shortest = self.tolerance_change / _largest(self._direction).double()
        return {
            row: search(
                Point(0.0, float(here.objective[row]), float(slope[row]), here.gradient[row]),
                float(self._length[row]),
                float(shortest[row]),
                self.max_eval - int(evaluations[row]),
            )
            for row in self.active.nonzero().squeeze(1).tolist()
        }


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """``(row, number)``."""
    return torch.cat([tensor.detach().flatten(1) for tensor in tensors], 1)


def _largest(numbers: Tensor) -> Tensor:
    """The largest absolute value of every row, on the CPU; NaN where there is one."""
    return numbers.abs().amax(1).cpu()
