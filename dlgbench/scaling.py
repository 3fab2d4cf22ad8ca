"""How the cost of closures and of L-BFGS grows: with the width of a batch, the resolution, the history."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from dlgbench import trial
from dlgbench.compiler import Compiler
from dlgbench.measure import Table, alternating, case, prepared, textbook, threads
from dlgbench.optim import LBFGS


def widths(counts: Sequence[int], repeats: int, compiler: Compiler) -> Table:
    """Milliseconds per LeNet closure against how many are evaluated together."""
    rows = []
    for count in counts:
        attack, leak = prepared([case("lenet_dlg", seed=seed) for seed in range(count)])
        dummies = attack.dummy_images.detach(), attack.dummy_labels.detach()
        compiler.prepare(attack.closure, trial.identity(case("lenet_dlg")), attack.example(leak), 0)
        with threads(attack.closure.threads):
            (seconds,) = alternating([partial(attack.evaluate, *dummies, leak)], repeats)
        rows.append({"cases": count, "ms a case": 1e3 * median(seconds) / count})
    return rows


def resolutions(network: str, sides: Sequence[int], repeats: int) -> Table:
    """Milliseconds per closure against the resolution, ours eager and the textbook's."""
    rows = []
    for side in sides:
        attack, leak = prepared([case(network, side)])
        example, book = attack.example(leak), textbook(case(network, side))
        theirs, ours = alternating([book.closure, partial(attack.closure, *example)], repeats)
        rows.append(
            {
                "network": network,
                "px": side,
                "textbook ms": 1e3 * median(theirs),
                "eager ms": 1e3 * median(ours),
            }
        )
    return rows


def histories(sizes: Sequence[int], rows: int, repeats: int) -> Table:
    """Milliseconds per iteration and row of L-BFGS alone, for LeNet's 3172 unknowns, against torch's."""
    found = []
    start = torch.randn(rows, 3172, generator=torch.Generator().manual_seed(0))
    scales = torch.logspace(-3, 0, 3172)
    options = {"max_iter": 20, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    for size in sizes:
        x, one = start.clone().requires_grad_(), start[0].clone().requires_grad_()
        ours = LBFGS([x], history_size=size, **options)  # type: ignore[arg-type]
        torchs = torch.optim.LBFGS([one], history_size=size, **options)  # type: ignore[arg-type]

        def batch(x: Tensor = x) -> Tensor:
            x.grad = scales * x.detach()
            return (scales * x.detach() ** 2).sum(1) / 2

        def single(one: Tensor = one) -> float:
            one.grad = scales * one.detach()
            return float((scales * one.detach() ** 2).sum() / 2)

        for _ in range(size // 20 + 1):  # until the histories are full
            ours.step(batch), torchs.step(single)  # type: ignore[no-untyped-call]
        with threads(1):
            mine, theirs = alternating([partial(ours.step, batch), partial(torchs.step, single)], repeats)
        found.append(
            {
                "pairs": size,
                "rows": rows,
                "ours ms": 1e3 * median(mine) / 20 / rows,
                "torch ms": 1e3 * median(theirs) / 20,
            }
        )
    return found
