"""`Defense`: what a client shares instead of its gradient, and what an attacker who knows it can foresee."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, overload

import torch
from torch import Tensor

from dlgbench.errors import Unsuitable, UsageError
from dlgbench.prepare import Network

Tensors = dict[str, Tensor]
UNIFORM = 1 / math.sqrt(12)
"""The standard deviation of what is rounded away, in units of the spacing."""


class Client(Protocol):
    """Whoever can tell the gradient of a loss: the true client, and an attacker in its place."""

    @property
    def head(self) -> str:
        """The name of the linear layer that gives the logits."""

    @property
    def weights(self) -> Tensors:
        """The network's weights, by name."""

    def gradient(self, images: Tensor, labels: Tensor, weights: Tensors | None = None) -> Tensors:
        """The gradient by name, at other weights if given; ``images`` are ``(image, channel, height, width)``
        in [0, 1], ``labels`` probabilities ``(image, class)``.  Differentiable in all of them."""

    def features(self, images: Tensor) -> Tensor:
        """What enters the head, ``(image, feature)``, differentiable."""

    def outputs(self, images: Tensor, weights: Tensors) -> Sequence[Tensor]:
        """All that the network gives for ``images``, the logits first, differentiable in both."""


class Defense(ABC):
    """What a client does before it shares; a subclass is a frozen dataclass, whose fields are its options.

    All randomness comes from a generator on the CPU: every device then meets the same draws.
    """

    @overload
    def __call__(self, gradients: Tensors, generator: torch.Generator) -> Tensors: ...

    @overload
    def __call__(self, gradients: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]: ...

    def __call__(
        self, gradients: Tensors | Sequence[Tensor], generator: torch.Generator
    ) -> Tensors | list[Tensor]:
        """What is shared instead of ``gradients``: of their shapes and dtypes.

        Raises UsageError where a gradient is not finite, or where the defence needs more than a gradient.
        """
        if not isinstance(gradients, dict):
            named = {str(index): gradient for index, gradient in enumerate(gradients)}
            return list(self(named, generator).values())
        return self.defend(finite(gradients), generator)

    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        """What is shared instead of finite ``gradients``, if nothing else is needed to tell."""
        raise UsageError(
            f"{type(self).__name__}: expected the client's data, got a gradient; call its `update` instead"
        )

    @property
    def least(self) -> int:
        """How many private images an update must hold to be what it is called."""
        return 1

    def refusal(self, trains: bool) -> str | None:
        """Why this cannot be run, to train with or to be attacked, and the remedy; None where it can."""
        return None

    def protect(self, network: Network, shape: tuple[int, ...]) -> Network:
        """The network that is trained instead, for images ``(image, channel, height, width)``.

        It may be changed in place.  Raises Unsuitable where this defence does not fit it.
        """
        return network

    @abstractmethod
    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        """What one update of this client adds to the training, a gradient by name."""

    @abstractmethod
    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        """What ``client`` would share of other data, as far as one who sees ``shared`` can tell.

        Differentiable in the data; may be batched and compiled.
        """

    def doubt(self, shared: Tensors, batch: int) -> Tensors:
        """The standard deviation of what nobody can foresee, of ``batch`` images."""
        return {name: gradient.new_zeros(()) for name, gradient in shared.items()}

    def observed(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        """What an attacker sees of this client's share: the `update`, unless it is encrypted or repeated."""
        return self.update(client, images, labels, generator)

    def size(self, shared: Tensors) -> int:
        """How many bytes a client sends for it."""
        return sum(gradient.nbytes for gradient in shared.values())

    def epsilon(self, rate: float, steps: int, delta: float) -> float | None:
        """The privacy loss at ``delta`` of so many updates on batches of this share of all images.

        None where the defence promises none.
        """
        return None


class GradientDefense(Defense):
    """A defence that is a pure function of the gradient."""

    @abstractmethod
    def defend(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        """What is shared instead of finite ``gradients``, which stay as they are."""

    def foreseen(self, ours: Tensors, shared: Tensors) -> Tensors:
        """What a client whose gradient is ``ours`` would share: the `expected` of a gradient."""
        return ours

    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        return self(client.gradient(images, labels), generator)

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        return self.foreseen(client.gradient(images, labels), shared)


def taken_apart(network: Network, shape: tuple[int, ...]) -> Network:
    """``network``, for a defence that takes a batch apart; raises Unsuitable where that cannot be."""
    if network.has_masks and shape[0] > 1:
        raise Unsuitable(
            "this defence takes batches apart and this network draws for whole ones: expected a batch of 1"
        )
    return network


def finite(gradients: Tensors) -> Tensors:
    """``gradients``; raises UsageError where one is not finite."""
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise UsageError(
                f"gradient {name!r}: expected finite numbers, got NaN or infinity, which a defence "
                "would spread or hide; leave this update out, or lower the learning rate"
            )
    return gradients


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal draws, shaped like ``like``, in its dtype and on its device, drawn on the CPU."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform draws in (0, 1), as `normal`'s."""
    smallest = torch.finfo(like.dtype).tiny
    drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype)
    return drawn.clamp_min(smallest).to(like.device)


def norm(gradients: Tensors) -> Tensor:
    """The Euclidean norm over all tensors."""
    return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()


def clipped(gradients: Tensors, bound: float) -> Tensors:
    """``gradients``, all shortened by the same factor to a norm of at most ``bound``."""
    factor = bound / norm(gradients).clamp_min(bound)
    return {name: factor * gradient for name, gradient in gradients.items()}


def flat(gradients: Tensors) -> Tensor:
    """All entries of finite ``gradients`` in one vector."""
    return torch.cat([gradient.flatten() for gradient in finite(gradients).values()])


def unflat(values: Tensor, like: Tensors) -> Tensors:
    """The inverse of `flat`, in the shapes of ``like``."""
    parts = torch.split(values, [tensor.numel() for tensor in like.values()])
    return {name: part.view_as(like[name]) for name, part in zip(like, parts, strict=True)}


def client_sums(client: Client, images: Tensor, labels: Tensor, clients: int) -> list[Tensor]:
    """The sum of the gradients of every client's part of a batch, flat; 0 of a client without images."""
    length = sum(weight.numel() for weight in client.weights.values())
    parts = zip(images.tensor_split(clients), labels.tensor_split(clients), strict=True)
    return [
        len(some) * flat(client.gradient(some, theirs)) if len(some) else images.new_zeros(length)
        for some, theirs in parts
    ]
