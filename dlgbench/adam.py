"""Adam for attacks: several iterations a step, within the range of pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BoxedAdam(torch.optim.Adam):
    """Adam, ``iterations`` times a step, clamped to a box ``(low, high)`` after each."""

    def __init__(self, dummies: Tensor, box: tuple[Tensor, Tensor], lr: float, iterations: int) -> None:
        super().__init__([dummies], lr=lr)
        self.dummies, self.box, self.iterations = dummies, box, iterations

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Returns the closure's first answer."""
        answers = []
        for _ in range(self.iterations):
            with torch.enable_grad():
                answers.append(closure())
            self.descend()
            with torch.no_grad():
                self.dummies.clamp_(*self.box)
        return answers[0]

    def descend(self) -> None:
        """One iteration, with the gradient that the closure has left."""
        super().step()
