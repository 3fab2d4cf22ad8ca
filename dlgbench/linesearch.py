"""Line searches for one problem, as generators that ask for evaluations.

`strong_wolfe` is that of ``torch.optim.LBFGS``: a bracketing phase, then a zoom by safeguarded cubic
interpolation; Nocedal and Wright, "Numerical Optimization", second edition, algorithms 3.5 and 3.6, with
the constants and safeguards of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import NamedTuple

from torch import Tensor

DECREASE = 1e-4
"""c1 of the first Wolfe condition."""
CURVATURE = 0.9
"""c2 of the second."""
SHORTENED = 4
"""How often `backtracking` tries a tenth before it gives the direction up."""


class Point(NamedTuple):
    """A point of the line: its step length, the objective and the objective's slope along the line."""

    step: float
    objective: float
    slope: float
    gradient: Tensor
    """The gradient of the whole problem, carried along for the caller."""


Search = Generator[float, Point, Point | None]
"""Yields step lengths, is sent the `Point` at each, and returns the one to go to, or None where the direction
is to be given up, and all that led to it."""
LineSearch = Callable[[Point, float, float, int], Search]
"""Begins a `Search`, given the point at step 0, the first step to try, the length of a bracket or step at
which to give up, and how many evaluations there may be beyond the first."""


def strong_wolfe(origin: Point, step: float, shortest: float, evaluations: int) -> Search:
    """A point that satisfies both strong Wolfe conditions, or the lowest found."""
    previous, here, left = origin, (yield step), evaluations
    while left > 0:
        if _too_high(origin, here) or (left < evaluations - 1 and here.objective >= previous.objective):
            break
        if _is_flat(origin, here):
            return here
        if here.slope >= 0:
            break
        bounds = here.step + 0.01 * (here.step - previous.step), here.step * 10
        step = cubic_minimum(previous, here, *bounds)
        previous, here, left = here, (yield step), left - 1
    else:
        previous = origin
    return (yield from _zoom(origin, [previous, here], shortest, left))


def backtracking(origin: Point, step: float, shortest: float, evaluations: int) -> Search:
    """The first of ``step``, its tenth, the tenth of that, … that does not climb; else none.

    It costs nothing where the first step descends, as nearly all of L-BFGS do.
    """
    for _ in range(min(evaluations, SHORTENED) + 1):
        here = yield step
        if here.objective <= origin.objective:
            return here
        step /= 10
    return None


def _zoom(origin: Point, bracket: list[Point], shortest: float, left: int) -> Search:
    low, stuck = _lower(bracket), False
    while left > 0 and not abs(bracket[1].step - bracket[0].step) < shortest:
        step, stuck = _kept_inside(cubic_minimum(bracket[0], bracket[1]), bracket, stuck)
        here, left = (yield step), left - 1
        if _too_high(origin, here) or here.objective >= bracket[low].objective:
            bracket[1 - low] = here
            low = _lower(bracket)
        elif _is_flat(origin, here):
            return here
        else:
            if here.slope * (bracket[1 - low].step - bracket[low].step) >= 0:
                bracket[1 - low] = bracket[low]
            bracket[low] = here
    return bracket[low]


def _kept_inside(step: float, bracket: list[Point], stuck: bool) -> tuple[float, bool]:
    """``step``, or a tenth of the bracket inside where it is at an end or near one for the second time."""
    start, end = sorted(point.step for point in bracket)
    margin = 0.1 * (end - start)
    if not min(end - step, step - start) < margin:
        return step, False
    if not (stuck or step >= end or step <= start):
        return step, True
    return (end - margin if abs(step - end) < abs(step - start) else start + margin), False


def cubic_minimum(a: Point, b: Point, least: float | None = None, most: float | None = None) -> float:
    """Where the cubic through two points and their slopes is least, between the bounds.

    Nocedal and Wright, equation 3.59; the bounds are the points unless given, and the middle between
    them is returned where the cubic has no minimum.
    """
    a, b = sorted((a, b), key=lambda point: point.step)
    least, most = (a.step if least is None else least), (b.step if most is None else most)
    if a.step < b.step:
        d1 = a.slope + b.slope - 3 * (a.objective - b.objective) / (a.step - b.step)
        square = d1 * d1 - a.slope * b.slope
        if square >= 0 and (bend := b.slope - a.slope + 2 * math.sqrt(square)) != 0:
            step = b.step - (b.step - a.step) * (b.slope + math.sqrt(square) - d1) / bend
            return min(max(step, least), most)
    return (least + most) / 2


def _too_high(origin: Point, here: Point) -> bool:
    return here.objective > origin.objective + DECREASE * here.step * origin.slope


def _is_flat(origin: Point, here: Point) -> bool:
    return abs(here.slope) <= -CURVATURE * origin.slope


def _lower(bracket: list[Point]) -> int:
    return 0 if bracket[0].objective <= bracket[1].objective else 1
