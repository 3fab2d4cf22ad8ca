"""Adam for attacks: several iterations a step, within the range of pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BoxedAdam(torch.optim.Adam):
    """Adam, ``iterations`` times a step, clamped to a box ``(low, high)`` after each.

    Rows that are not ``active``, a mask on the CPU that others may change, stay where they are.
    """

    def __init__(
        self, dummies: Tensor, box: tuple[Tensor, Tensor], lr: float, iterations: int, active: Tensor
    ) -> None:
        super().__init__([dummies], lr=lr)
        self.dummies, self.box, self.iterations, self.active = dummies, box, iterations, active

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Returns the closure's first answer."""
        answers = []
        for _ in range(self.iterations):
            with torch.enable_grad():
                answers.append(closure())
            resting = ~self.active
            before = self.dummies.detach()[resting]
            self.descend()
            with torch.no_grad():
                self.dummies.clamp_(*self.box)
                self.dummies[resting] = before
        return answers[0]

    def descend(self) -> None:
        """One iteration, with the gradient that the closure has left."""
        super().step()
