"""L-BFGS of many rows, against `torch.optim.LBFGS` on each row alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dlgbench.errors import UsageError
from dlgbench.linesearch import LineSearch, Point, backtracking, cubic_minimum, strong_wolfe
from dlgbench.optim import LBFGS

N = 12
Objective = Callable[[Tensor], Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


def quartic(x: Tensor) -> Tensor:
    scales = torch.logspace(-1, 2, x.shape[-1], dtype=x.dtype)
    return (scales * x**2).sum(-1) + (x**4).sum(-1)


def wavy(x: Tensor) -> Tensor:
    return (x**2 / 20 + x.sin()).sum(-1) + (x[..., 1:] * x[..., :-1]).sum(-1) / 9


def starts(rows: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(rows, N, generator=generator, dtype=torch.float64).to(dtype)


def torch_alone(f: Objective, x: Tensor, steps: int, **options: object) -> tuple[list[Tensor], list[int]]:
    """The iterates after each step of torch's own optimiser, and how often it asked in each."""
    parameter = x.clone().requires_grad_()
    search = "strong_wolfe" if options.pop("line_search", None) else None
    optimizer = torch.optim.LBFGS([parameter], line_search_fn=search, **options)  # type: ignore[arg-type]
    iterates, counts, count = [], [], 0

    def closure() -> float:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        value = f(parameter)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        iterates.append(parameter.detach().clone())
        counts.append(count)
    return iterates, counts


def rowwise(f: Objective, x: Tensor, steps: int, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """The same of ours, for all rows at once, with the parameters in two pieces."""
    pieces = [x[:, :5].clone().requires_grad_(), x[:, 5:].clone().view(len(x), -1, 1).requires_grad_()]
    optimizer = LBFGS(pieces, **options)  # type: ignore[arg-type]
    count = torch.zeros(len(x), dtype=torch.long)
    iterates, counts = [], []

    def whole() -> Tensor:
        return torch.cat([piece.flatten(1) for piece in pieces], 1)

    def closure() -> Tensor:
        count.add_(optimizer.active)
        optimizer.zero_grad()
        values = f(whole())
        values.sum().backward()  # type: ignore[no-untyped-call]
        poison = torch.where(optimizer.active, 0.0, torch.nan)  # what it gives for others must not matter
        for piece in pieces:
            assert piece.grad is not None
            piece.grad += poison.to(piece).view(-1, *(1,) * (piece.dim() - 1))
        return values.detach() + poison.to(values)

    for _ in range(steps):
        optimizer.step(closure)
        iterates.append(whole().detach().clone())
        counts.append(count.clone())
    return iterates, counts


@pytest.mark.parametrize("line_search", [None, strong_wolfe])
@pytest.mark.parametrize("f", [rosenbrock, quartic, wavy])
@pytest.mark.parametrize("history_size", [3, 100])
def test_every_row_equals_torch_alone_in_double_precision(
    f: Objective, line_search: LineSearch | None, history_size: int
) -> None:
    options = {"line_search": line_search, "history_size": history_size, "lr": 1.0 if line_search else 0.01}
    x = starts(5, torch.float64)
    ours, counts = rowwise(f, x, 2, **options)  # 40 iterations: rounding grows in each
    for row in range(5):
        theirs, asked = torch_alone(f, x[row], 2, **options)
        assert [int(count[row]) for count in counts] == asked
        for mine, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine[row], reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("line_search", [None, strong_wolfe])
def test_every_row_equals_torch_alone_in_single_precision(line_search: LineSearch | None) -> None:
    options = {"line_search": line_search, "history_size": 10, "max_iter": 8}
    x = starts(4, torch.float32, 0.3)
    ours, counts = rowwise(quartic, x, 2, **options)
    for row in range(4):
        theirs, asked = torch_alone(quartic, x[row], 2, **options)
        assert [int(count[row]) for count in counts] == asked
        torch.testing.assert_close(ours[-1][row], theirs[-1], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance_grad": 1e-1},
        {"tolerance_change": 1e-3},
        {"tolerance_change": 0.0, "tolerance_grad": 0.0, "max_iter": 4},
        {"max_eval": 3},
        {"max_iter": 1},
        {"lr": 0.5},
    ],
)
@pytest.mark.parametrize("line_search", [None, strong_wolfe])
def test_rows_stop_where_torch_stops(options: dict[str, object], line_search: LineSearch | None) -> None:
    x = starts(4, torch.float64, 0.3)  # from further off rows run away to 1e129, where rounding decides
    ours, counts = rowwise(wavy, x, 3, line_search=line_search, **options)
    for row in range(4):
        theirs, asked = torch_alone(wavy, x[row], 3, line_search=line_search, **options)
        assert [int(count[row]) for count in counts] == asked
        torch.testing.assert_close(ours[-1][row], theirs[-1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("line_search", [None, strong_wolfe])
def test_a_row_of_nan_changes_no_other(line_search: LineSearch | None) -> None:
    x = starts(4, torch.float64)
    clean, _ = rowwise(wavy, x, 3, line_search=line_search)
    x[1] = torch.nan
    spoilt, _ = rowwise(wavy, x, 3, line_search=line_search)
    others = [0, 2, 3]
    torch.testing.assert_close(clean[-1][others], spoilt[-1][others], rtol=1e-9, atol=1e-9)
    assert spoilt[-1][1].isnan().all()


def test_a_row_that_blows_up_stops_there() -> None:
    def cliff(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] < -1, torch.inf, 1.0) * (x**2).sum(-1)

    x = torch.full((2, N), 0.5, dtype=torch.float64)
    x[0, 0] = -0.99
    _, counts = rowwise(lambda x: cliff(x) + x[:, 0] * 100, x, 1, lr=10.0)
    assert int(counts[0][0]) == 2


def test_rows_left_out_stay_where_they_are() -> None:
    x = starts(3, torch.float64)
    parameter, active = x.clone().requires_grad_(), torch.tensor([True, False, True])
    optimizer = LBFGS([parameter], active=active)

    def closure() -> Tensor:
        optimizer.zero_grad()
        values = wavy(parameter)
        values.sum().backward()  # type: ignore[no-untyped-call]
        return values.detach()

    optimizer.step(closure)
    assert torch.equal(parameter[1], x[1])
    assert not torch.equal(parameter[0], x[0])
    assert active.tolist() == [True, False, True]


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(UsageError, match="equally many rows"):
        LBFGS([nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 3))])


def test_backtracking_costs_nothing_where_every_step_descends() -> None:
    x = starts(3, torch.float64, 0.3)
    ours, counts = rowwise(quartic, x, 2, line_search=backtracking, lr=0.1)
    for row in range(3):
        _, asked = torch_alone(
            quartic, x[row], 2, lr=0.1, max_iter=21
        )  # all of our last points are evaluated
        assert [int(count[row]) for count in counts] == asked
    plain, _ = rowwise(quartic, x, 1, lr=0.1)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wall", [torch.inf, torch.nan, 1e9])
def test_backtracking_never_climbs(wall: float) -> None:
    def walled(x: Tensor) -> Tensor:
        return torch.where((x.abs() > 3).any(-1), wall, 1.0) * quartic(x)

    x = starts(6, torch.float64).clamp(-3, 3)
    options = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "lr": 10.0}  # ten times too far
    ours, _ = rowwise(walled, x, 12, line_search=backtracking, **options)
    lost, _ = rowwise(walled, x, 12, **options)
    values = torch.stack([walled(iterate) for iterate in [x, *ours]])
    assert (values[1:] <= values[:-1]).all()
    assert (values[-1] < 1e-3 * values[0]).all()
    assert not (walled(lost[-1]) < values[-1]).any()


def test_backtracking_gives_up_where_it_is() -> None:
    search = backtracking(Point(0.0, 1.0, -1.0, torch.zeros(0)), 1.0, 0.0, 2)
    assert next(search) == 1.0
    assert search.send(Point(1.0, 2.0, 0.0, torch.zeros(0))) == pytest.approx(0.1)
    assert search.send(Point(0.1, 2.0, 0.0, torch.zeros(0))) == pytest.approx(0.01)
    with pytest.raises(StopIteration) as end:
        search.send(Point(0.01, 2.0, 0.0, torch.zeros(0)))
    assert end.value.value is None


def test_the_cubic_minimum_is_that_of_the_cubic() -> None:
    def point(t: float) -> Point:
        return Point(t, t**3 - 2 * t**2 - 5 * t + 1, 3 * t**2 - 4 * t - 5, torch.zeros(0))

    least = (4 + (16 + 60) ** 0.5) / 6
    assert cubic_minimum(point(0.0), point(3.0)) == pytest.approx(least)
    assert cubic_minimum(point(3.0), point(0.0)) == pytest.approx(least)
    assert cubic_minimum(point(0.0), point(1.0)) == 1.0


def test_a_small_objective_needs_its_curvature() -> None:
    def small(x: Tensor) -> Tensor:
        return 1e-6 * (torch.linspace(1, 3, N) * x**2).sum(-1)

    options = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    start = starts(1, torch.float64)
    stuck, _ = rowwise(small, start, 3, **options)
    found, _ = rowwise(small, start, 3, **options, tolerance_curvature=0.0)
    assert float((stuck[-1] - start).abs().max()) < 1e-3
    assert float(found[-1].abs().max()) < 1e-3


def test_a_row_whose_direction_climbs_forgets_and_goes_on() -> None:
    """What was learnt in a flat valley sends it far up the walls of another, whatever it is shortened to."""
    curvature = 1e-12
    x = nn.Parameter(torch.ones(1, N, dtype=torch.float64))
    optimizer = LBFGS(
        [x], line_search=backtracking, tolerance_grad=0.0, tolerance_change=0.0, tolerance_curvature=0.0
    )

    def closure() -> Tensor:
        with torch.enable_grad():
            value = curvature * quartic(x)
        (x.grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach()

    optimizer.step(closure)
    x.data.fill_(2.0)
    curvature = 1.0
    before = float(quartic(x.detach()))
    for _ in range(4):
        optimizer.step(closure)
    assert float(quartic(x.detach())) < 1e-9 * before


def test_a_row_that_was_moved_goes_on_with_the_pairs_from_before() -> None:
    """Their direction there is that of the two loops (Nocedal and Wright 2006, algorithm 7.4) over those."""
    scales = torch.logspace(0, 3, 8, dtype=torch.float64)
    place = torch.nn.Parameter(torch.ones(1, 8, dtype=torch.float64))
    optimizer = LBFGS([place], line_search=backtracking, max_iter=1)
    places: list[Tensor] = []

    def closure() -> Tensor:
        place.grad = scales * place.detach()
        return (scales * place.detach().square()).sum(1) / 2

    for _ in range(5):
        places.append(place.detach()[0].clone())
        optimizer.step(closure)
    with torch.no_grad():
        place.copy_(torch.linspace(1, 2, 8)[None])
    optimizer.moved(0)
    before = place.detach()[0].clone()
    optimizer.step(closure)
    pairs = [(b - a, scales * (b - a)) for a, b in itertools.pairwise(places)]
    direction, weights = -scales * before, list[Tensor]()
    for s, y in reversed(pairs):
        weights.append(s @ direction / (s @ y))
        direction = direction - weights[-1] * y
    direction = direction * (pairs[-1][0] @ pairs[-1][1]) / pairs[-1][1].square().sum()
    for (s, y), weight in zip(pairs, reversed(weights), strict=True):
        direction = direction + (weight - y @ direction / (s @ y)) * s
    step = place.detach()[0] - before
    torch.testing.assert_close(step / step.norm(), direction / direction.norm())
