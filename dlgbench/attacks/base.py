"""`Attack`: what all attacks share, from the dummies to the choice of the best iterate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dlgbench.leak import Leak, Tensors, gradients, squared_distance, squared_norm
from dlgbench.prepare import Network


class Task(NamedTuple):
    """The shape of what is to be reconstructed: public knowledge, with the attacker's randomness."""

    image: int
    channel: int
    height: int
    width: int
    classes: int
    generators: Sequence[torch.Generator]
    """One per case, on the CPU: every device then meets the same draws.  Their number is the width."""


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
    where to `start`, what the `distance` is, and with which optimiser.  All tensors have a leading
    ``case`` dimension; ``distance`` is a function of one case.
    """

    dummy_images: nn.Parameter
    """``(case, image, channel, height, width)``, in the units of the network's normalised input."""
    dummy_labels: nn.Parameter
    """Logits, ``(case, image, class)``."""
    result: Reconstruction
    """What was found, on the CPU; there is one once the training has ended."""

    def __init__(self, network: Network, task: Task) -> None:
        super().__init__()
        self.network = network
        self.generators = task.generators
        starts = [self.start(task, generator) for generator in task.generators]
        dtype = network.mean.dtype
        self.dummy_images = nn.Parameter(torch.stack([images for images, _ in starts]).to(dtype))
        self.dummy_labels = nn.Parameter(torch.stack([labels for _, labels in starts]).to(dtype))
        self.best_images = self.dummy_images.detach().clone()
        self.best_labels = self.dummy_labels.detach().clone()
        self.best_objective = torch.full((len(starts),), torch.inf, dtype=dtype)
        self.trace: list[Tensor] = []
        self.closures = 0
        self._at_new_iterate = True

    @abstractmethod
    def start(self, task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The first dummies of one case: images ``(image, channel, height, width)``, labels' logits."""

    @abstractmethod
    def distance(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensor:
        """The objective of one case, a scalar; images in [0, 1], labels as logits."""

    def gradients(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensors:
        """The gradient of one case's dummies, for label probabilities ``labels``."""
        return gradients(self.network, leak.weights, leak.buffers, images, labels)

    def pixels(self, dummies: Tensor) -> Tensor:
        """Dummies as images whose pixels are meant to lie in [0, 1]."""
        return dummies * self.network.std + self.network.mean

    def objectives(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensor:
        """The objective of every case, ``(case,)``, for dummies of all cases."""
        rows = zip(self.pixels(images), labels, self._rows(leak), strict=True)
        return torch.stack([self.distance(*row) for row in rows])

    def on_fit_start(self) -> None:
        self.best_images, self.best_labels, self.best_objective = (
            tensor.to(self.device) for tensor in (self.best_images, self.best_labels, self.best_objective)
        )

    def on_train_batch_start(self, batch: Leak, batch_idx: int) -> None:
        self._leak = batch
        self._at_new_iterate = True

    def training_step(self, leak: Leak, step: int) -> Tensor:
        """One closure: the objective of every case, ``(case,)``."""
        self.closures += 1
        objective = self.objectives(self.dummy_images, self.dummy_labels, leak)
        if self._at_new_iterate:  # the optimiser's first closure of a step is at the iterate itself
            self._at_new_iterate = False
            self.keep(objective.detach())
        return objective

    def on_train_end(self) -> None:
        """Evaluate the last iterate too, and return to the best of all."""
        leak = self._leak
        with torch.no_grad():
            self.keep(self.objectives(self.dummy_images, self.dummy_labels, leak))
            objective = self.objectives(self.best_images, self.best_labels, leak)
            images, labels = self.pixels(self.best_images), self.best_labels.softmax(-1)
            rows = zip(images, labels, self._rows(leak), strict=True)
            relative = torch.stack([self._relative(*row) for row in rows])
        self.result = Reconstruction(images.cpu(), labels.cpu(), objective.cpu(), relative.cpu())

    def backward(self, loss: Tensor, *args: object, **kwargs: object) -> None:
        torch.autograd.backward(loss.sum(), inputs=[self.dummy_images, self.dummy_labels])

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

    def _relative(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensor:
        ours = self.gradients(images, labels, leak)
        return squared_distance(ours, leak.gradients) / squared_norm(leak.gradients)

    def _rows(self, leak: Leak) -> Iterator[Leak]:
        return (self._with_masks(leak.row(case), case) for case in range(len(self.generators)))

    def _with_masks(self, leak: Leak, case: int) -> Leak:
        """The leak with a fresh draw for every dropout mask that it does not hold."""
        drawn = self.network.draw_masks(self.generators[case])
        masks = {name: mask.to(self.device) for name, mask in drawn.items()}
        return leak._replace(buffers={**masks, **leak.buffers})


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    return rows.view(-1, *(1,) * (tensor.dim() - 1))
