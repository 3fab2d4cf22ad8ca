"""`Attack`: what all attacks share, from the dummies to the choice of the best iterate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dlgbench.closures import Closure, Values, eager_width_for, width_for
from dlgbench.labels import logits, recover
from dlgbench.leak import Client, Leak, Tensors, gradients, squared_distance, squared_norm
from dlgbench.masks import in_order
from dlgbench.prepare import Network


class Foresight(Protocol):
    """What an attacker who knows a defence can tell of what it shares: see `dlgbench.defenses`."""

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors: ...

    def doubt(self, shared: Tensors, batch: int) -> Tensors: ...


class Task(NamedTuple):
    """The shape of what is to be reconstructed: public knowledge, with the attacker's randomness."""

    image: int
    channel: int
    height: int
    width: int
    classes: int
    generators: Sequence[torch.Generator]
    """One per case, on the CPU: every device then meets the same draws.  Their number is the width."""
    starts: int = 1
    """So many rows after one another are starts of the same case."""
    defense: Foresight | None = None
    """What is public of the clients' defence, for attacks that adapt to it."""


class Reconstruction(NamedTuple):
    """What an attack returns for every case: its best iterate by objective."""

    images: Tensor
    """``(case, image, channel, height, width)``, unclamped, meant to lie in [0, 1]."""
    labels: Tensor
    """Probabilities, ``(case, image, class)``."""
    objective: Tensor
    """The objective evaluated anew at this iterate, ``(case,)``."""
    relative: Tensor
    """``|g - g*|^2 / |g*|^2`` there, whatever the objective is, ``(case,)``."""


class Attack(pl.LightningModule, ABC):
    """Optimises dummy images and labels until their gradient matches the leak's.

    It is given a network, a task and, batch by batch, a `Leak`: never a `Secret`.  A subclass says
    where to `start`, with which optimiser, and what the `distance` is.  All tensors have a leading
    ``case`` dimension; ``distance`` is a pure function of one case, which is batched and compiled.
    """

    dummy_images: nn.Parameter
    """``(case, …)``: what is optimised, from which `pixels` makes the images."""
    dummy_labels: nn.Parameter
    """Logits, ``(case, image, class)``."""
    active: Tensor
    """Which cases the next closure has to evaluate, ``(case,)`` on the CPU.  A guard may clear entries
    between steps; the optimiser may, while a step runs."""
    best_images: Tensor
    """The dummies with the least objective so far, once the training has begun; `best_labels` with them."""
    best_labels: Tensor
    result: Reconstruction
    """What was found, on the CPU; there is one once the training has ended."""
    cooperative = False
    """Whether the starts of a case need each other to the end; else only the best goes on after a while."""

    def __init__(self, network: Network, task: Task) -> None:
        super().__init__()
        self.network = network
        self.generators = task.generators
        starts = [self.start(task, generator) for generator in task.generators]
        dtype = network.mean.dtype
        self.dummy_images = nn.Parameter(torch.stack([images for images, _ in starts]).to(dtype))
        self.dummy_labels = nn.Parameter(torch.stack([labels for _, labels in starts]).to(dtype))
        self.best_objective = torch.full((len(starts),), torch.inf, dtype=dtype)
        self.active = torch.ones(len(starts), dtype=torch.bool)
        size = task.image * task.height * task.width, network.mean.device
        widths = (min(width(*size), len(starts)) for width in (width_for, eager_width_for))
        self.closure = Closure(self.distance, *widths)
        self.trace: list[Tensor] = []
        self.closures = torch.zeros(len(starts), dtype=torch.long)
        self.told: Tensors = {}  # of the clients' draws what was inferred, ``(case, …)``, NaN where nothing
        # what is sought before the first step tells its objective, and asks whether it is too late
        self.tell: Callable[[float], None] = lambda objective: None
        self.late: Callable[[], bool] = lambda: False
        self._at_new_iterate = True
        self._gathered: tuple[Leak, list[int], Leak] | None = None

    @abstractmethod
    def start(self, task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The first dummies of one case: of the images, and the labels' logits ``(image, class)``."""

    def distance(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensor:
        """The objective of one case, a scalar; images in [0, 1], labels as logits.

        ``|g - g*|^2`` over all parameters (Zhu et al. 2019, equation 3), unless an attack has its own.
        """
        return squared_distance(self.gradients(images, labels.softmax(-1), leak), leak.gradients)

    def gradients(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensors:
        """The gradient of one case's dummies, for label probabilities ``labels``."""
        return gradients(self.network, leak.weights, leak.buffers, images, labels)

    def pixels(self, dummies: Tensor) -> Tensor:
        """All cases' dummies as images ``(case, image, channel, height, width)`` meant to lie in [0, 1]."""
        return dummies * self.network.std + self.network.mean

    def look(self, leak: Leak) -> None:
        """What an attack does once, before its first step: nothing, unless it infers something first."""

    def reconstructed(self, dummies: Tensor) -> Tensor:
        """`pixels`, unless an attack makes more of them by guessing what its gradient does not tell."""
        return self.pixels(dummies)

    def matched(self, dummies: Tensor) -> Tensor:
        """The images whose distance is told: `reconstructed`, unless more was done to those afterwards."""
        return self.reconstructed(dummies)

    def evaluate(self, dummies: Tensor, labels: Tensor, leak: Leak) -> Values:
        """Objectives and their gradients in the dummies; NaN and 0 for cases that are not active."""
        leaf = dummies.detach().requires_grad_()
        with torch.enable_grad():
            images = self.pixels(leaf)
        values = self._evaluate(images.detach(), labels, leak)
        (gradient,) = torch.autograd.grad(images, leaf, values.images)
        return values._replace(images=gradient)

    def _evaluate(self, images: Tensor, labels: Tensor, leak: Leak) -> Values:
        wanted = self.active.nonzero().squeeze(1).tolist()
        rows = wanted + wanted[:1] * (self.closure.rounded(len(wanted)) - len(wanted))
        every = rows == list(range(len(self.active)))
        chosen = (images, labels) if every else (images[rows], labels[rows])
        values = self.closure(*chosen, self.seen(leak, rows, len(wanted)))
        if every:
            return values
        whole = Values(self.best_objective * torch.nan, torch.zeros_like(images), torch.zeros_like(labels))
        for all_cases, some in zip(whole, values, strict=True):
            all_cases[wanted] = some[: len(wanted)]
        return whole

    def seen(self, leak: Leak, rows: list[int], wanted: int | None = None) -> Leak:
        """The leak of ``rows``, with fresh draws for every layer whose draws it does not hold.

        Behind the first ``wanted`` rows nobody asks for the values: they get the first one's draws.
        """
        some = leak if rows == list(range(len(self.active))) else self._gather(leak, rows)
        if not self.network.has_masks:
            return some
        images = self.dummy_images.shape[1]
        draws = [self.network.draw_masks(images, self.generators[row]) for row in rows[:wanted]]
        draws += draws[:1] * (len(rows) - len(draws))
        masks = {name: torch.stack([draw[name] for draw in draws]).to(self.device) for name in draws[0]}
        for name, told in self.told.items():
            masks[name] = torch.where(told[rows].isnan(), masks[name], told[rows])
        return some._replace(buffers={**masks, **some.buffers})

    def example(self, leak: Leak) -> tuple[Tensor, Tensor, Leak]:
        """Arguments such as the closure will get, for measuring and compiling it; nothing is drawn."""
        some, device = leak.rows(slice(self.closure.width)), self.network.mean.device
        masks = self.network.draw_masks(self.dummy_images.shape[1], torch.Generator())
        drawn = {name: torch.stack([mask] * self.closure.width).to(device) for name, mask in masks.items()}
        dummies = (self.pixels(self.dummy_images.to(device)), self.dummy_labels.to(device))
        images, labels = (tensor.detach()[: self.closure.width] for tensor in dummies)
        return images, labels, some._replace(buffers={**drawn, **some.buffers})

    def on_train_batch_start(self, batch: Leak, batch_idx: int) -> None:
        if batch_idx == 0:
            with torch.no_grad():
                self.look(batch)
            self.best_images = self.dummy_images.detach().clone()
            self.best_labels = self.dummy_labels.detach().clone()
            self.best_objective = self.best_objective.to(self.device)
        self._leak = batch
        self._at_new_iterate = True

    def training_step(self, leak: Leak, step: int) -> Tensor:
        """One closure: the objective of every case, ``(case,)``."""
        self.closures += self.active
        values = self.evaluate(self.dummy_images.detach(), self.dummy_labels.detach(), leak)
        if self._at_new_iterate:  # the optimiser's first closure of a step is at the iterate itself
            self._at_new_iterate = False
            self.keep(values.objective)
        self._values = values
        return values.objective

    def backward(self, loss: Tensor, *args: object, **kwargs: object) -> None:
        self.dummy_images.grad, self.dummy_labels.grad = self._values.images, self._values.labels

    def on_train_end(self) -> None:
        """Evaluate the last iterate too, and return to the best of all."""
        leak, cases = self._leak, range(len(self.active))
        self.active.fill_(True)
        self.keep(self.evaluate(self.dummy_images.detach(), self.dummy_labels.detach(), leak).objective)
        objective = self.evaluate(self.best_images, self.best_labels, leak).objective
        images, labels = self.reconstructed(self.best_images), self.best_labels.softmax(-1)
        with torch.no_grad():
            seen, matched = self.seen(leak, list(cases)), self.matched(self.best_images)
            relative = torch.stack([self._relative(matched[i], labels[i], seen.row(i)) for i in cases])
        self.result = Reconstruction(images.cpu(), labels.cpu(), objective.cpu(), relative.cpu())

    def keep(self, objective: Tensor) -> None:
        """Note the objective at the current iterate, and the iterate where it is the best so far."""
        self.trace.append(objective)
        better = objective < self.best_objective
        self.best_objective = torch.where(better, objective, self.best_objective)
        self.best_images = torch.where(
            _like(better, self.best_images), self.dummy_images.detach(), self.best_images
        )
        self.best_labels = torch.where(
            _like(better, self.best_labels), self.dummy_labels.detach(), self.best_labels
        )

    def _gather(self, leak: Leak, rows: list[int]) -> Leak:
        """The leak of ``rows``, copied anew only where it or they are not those of the last call."""
        last = self._gathered
        if last is None or last[0] is not leak or last[1] != rows:
            last = self._gathered = leak, rows, leak.rows(torch.tensor(rows, device=self.device))
        return last[2]

    def _relative(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensor:
        ours = self.gradients(images, labels, leak)
        return squared_distance(ours, leak.gradients) / squared_norm(leak.gradients)


class LabelsFirst(Attack):
    """An attack that infers the labels before it starts, and optimises the images alone."""

    def start(self, task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Standard normal noise in the network's normalised input, and labels that say nothing yet."""
        images = torch.randn(task.image, task.channel, task.height, task.width, generator=generator)
        return images, torch.zeros(task.image, task.classes)

    def look(self, leak: Leak) -> None:
        """Set every case's labels to those that its head's gradient tells."""
        grey = torch.full(self.pixels(self.dummy_images).shape[1:], 0.5).to(self.dummy_images)
        for row, found in enumerate(self.dummy_labels):
            labels = recover(self.network, self.seen(leak, [row]).row(0), grey)
            ordered = in_order(self.network, leak.row(row), labels)
            found.copy_(logits(ordered, found.shape[-1]))


def total_variation(images: Tensor) -> Tensor:
    """The mean absolute difference of neighbours, beside and above each other, a scalar."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    return rows.view(-1, *(1,) * (tensor.dim() - 1))
