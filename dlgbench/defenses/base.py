"""`Defense`: a function of gradients, and what an attacker who knows it can foresee."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from dlgbench.errors import UsageError

Tensors = dict[str, Tensor]


class Defense(ABC):
    """A pure function of gradients; a subclass is a frozen dataclass, whose fields are its options.

    All randomness comes from a generator on the CPU: every device then meets the same draws.
    """

    @overload
    def __call__(self, gradients: Tensors, generator: torch.Generator) -> Tensors: ...

    @overload
    def __call__(self, gradients: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]: ...

    def __call__(
        self, gradients: Tensors | Sequence[Tensor], generator: torch.Generator
    ) -> Tensors | list[Tensor]:
        """What is shared instead of ``gradients``, by name or in order: of their shapes and dtypes.

        Raises UsageError where a gradient is not finite.
        """
        if not isinstance(gradients, dict):
            named = {str(index): gradient for index, gradient in enumerate(gradients)}
            return list(self(named, generator).values())
        for name, gradient in gradients.items():
            if not gradient.isfinite().all():
                raise UsageError(
                    f"gradient {name!r}: expected finite numbers, got NaN or infinity, which a defence "
                    "would spread or hide; leave this update out, or lower the learning rate"
                )
        return self.defend(gradients, generator)

    @abstractmethod
    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        """What is shared instead of finite ``gradients``, which stay as they are."""

    def expected(self, ours: Tensors, shared: Tensors) -> Tensors:
        """What a client whose gradient is ``ours`` would share, as far as one who sees ``shared`` can tell.

        Differentiable in ``ours``; may be batched and compiled.
        """
        return ours

    def doubt(self, shared: Tensors) -> Tensors:
        """The standard deviation of what nobody can foresee, as numbers or shaped like ``shared``."""
        return {name: gradient.new_zeros(()) for name, gradient in shared.items()}


def draws(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in (0, 1), shaped like ``like``, in its dtype and on its device, drawn on the CPU."""
    smallest = torch.finfo(like.dtype).tiny
    drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype)
    return drawn.clamp_min(smallest).to(like.device)


def norm(gradients: Tensors) -> Tensor:
    """The Euclidean norm over all tensors."""
    return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
