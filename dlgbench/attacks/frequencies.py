"""Images sought over frequencies and colours, from coarse to fine, by steps that never climb."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dlgbench.attacks.base import LabelsFirst, Task
from dlgbench.batchnorm import BatchNorm2d
from dlgbench.contrast import Told, likely, told
from dlgbench.leak import Leak
from dlgbench.linesearch import backtracking
from dlgbench.masks import read
from dlgbench.optim import LBFGS
from dlgbench.prepare import Network
from dlgbench.softening import POOL, SHARPNESS, adjustable
from dlgbench.spectrum import CONTRAST, Spectrum

NOISE = 0.2
"""The start's, in units of that contrast's coefficients."""
STAGES = (14, 1.0), (28, 1.0), (56, 1.0), (math.inf, 2.0), (math.inf, 4.0)
"""Frequencies, in periods a side, up to which an image is sought, and how sharp maxima are then."""
STAGE_STEPS = 4
"""How many steps each of these takes at most: a fifth of all where these are few."""


class Frequencies(LabelsFirst):
    """L-BFGS over an image's frequencies and colours, for a `distance` that a subclass has.

    The objective never climbs: a step that would is shortened.  ReLU and maxima, whose kinks have no second
    derivative to follow, are matched through a softened copy of the network.  An image of 56 px or more for
    which no start is solved is sought from coarse to fine, and its maxima begin softer.
    Where batch norm hides the images' contrast, it is the most that leaves them in the range of pixels; as
    it hides it but for its epsilon, it is followed to what the gradient tells of it.
    """

    def __init__(
        self,
        network: Network,
        task: Task,
        *,
        learning_rate: float,
        history: int,
        iterations: int,
    ) -> None:
        super().__init__(network, task)
        self.soft = adjustable(network)
        self.spectrum = Spectrum((task.channel, task.height, task.width), network.mean)
        self.hidden = any(type(module) is BatchNorm2d for module in network.modules())
        self.middle = network.mean if self.hidden else torch.full_like(network.mean, 0.5)
        self.maxima = SHARPNESS in dict(self.soft.named_buffers())
        size = min(task.height, task.width)
        self.stages = [(most if 4 * most <= size else math.inf, sharpness) for most, sharpness in STAGES]
        """`STAGES` as they are here: an image's highest frequencies are not sought apart from the next."""
        self.variances: Told | None = None
        """What the gradients tell of the images' contrast."""
        self.coarse = torch.full((len(task.generators),), self.stages[0][0] < math.inf)
        """Which cases are sought from coarse to fine."""
        self.noisy = self.coarse.clone()
        """In which there is noise: those, and what was not solved for but found in another way."""
        self.passband = torch.ones(1, 1, 1, task.height, task.width).to(network.mean)
        """The frequencies that are shown of a case, ``(case or 1, 1, 1, height, width)``."""
        self.sharpness = torch.full((len(task.generators),), POOL).to(network.mean)
        """How sharp a case's maxima are, ``(case,)``."""
        self.optimizer = partial(
            LBFGS, active=self.active,
            lr=learning_rate, history_size=history, max_iter=iterations, line_search=backtracking,
            tolerance_grad=0.0, tolerance_change=0.0, tolerance_curvature=0.0,
        )  # fmt: skip

    def start(self, task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A little noise that is smooth as photos are."""
        noise = torch.randn(task.image, task.channel, task.height, task.width, generator=generator)
        return NOISE * noise, torch.zeros(task.image, task.classes)

    def pixels(self, dummies: Tensor) -> Tensor:
        """The images with these coefficients."""
        return self.middle + CONTRAST * self.spectrum.images(self.passband * dummies)

    def coefficients(self, images: Tensor) -> Tensor:
        """The inverse of `pixels`, where every frequency is shown."""
        return self.spectrum.coefficients((images - self.middle) / CONTRAST)

    def look(self, leak: Leak) -> None:
        """Labels, then the masks that tell, then where to start, and the contrast of what is not solved."""
        super().look(leak)
        for row, labels in enumerate(self.dummy_labels):
            for name, mask in read(self.network, leak.row(row), labels.argmax(1)).items():
                unknown = torch.full((len(self.dummy_labels), *mask.shape), torch.nan).to(mask)
                self.told.setdefault(name, unknown)[row] = mask
        self.solve(leak)
        self.variances = told(self.network, leak) if self.hidden and self.noisy.any() else None

    def solve(self, leak: Leak) -> None:
        """What else is done before the first step: nothing, unless a start can be solved for."""

    def seen(self, leak: Leak, rows: list[int], wanted: int | None = None) -> Leak:
        """As every attack sees it, but with maxima as sharp as they are at this stage."""
        return self.sharpened(super().seen(leak, rows, wanted), rows)

    def example(self, leak: Leak) -> tuple[Tensor, Tensor, Leak]:
        """As every attack's, with some sharpness of maxima."""
        images, labels, some = super().example(leak)
        return images, labels, self.sharpened(some, range(len(images)))

    def sharpened(self, leak: Leak, rows: Sequence[int]) -> Leak:
        """The ``leak`` of ``rows`` with how sharp the maxima are, if the network has any."""
        if not self.maxima:
            return leak
        return leak._replace(buffers={**leak.buffers, SHARPNESS: self.sharpness[rows]})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.lbfgs = self.optimizer([self.dummy_images])
        return self.lbfgs

    def on_train_batch_start(self, batch: Leak, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        steps = min(STAGE_STEPS, max(1, int(self.trainer.estimated_stepping_batches) // len(self.stages)))
        stage, later = divmod(batch_idx, steps)
        if not later and (self.active & self.coarse).any():
            self.begin(stage, batch)

    def begin(self, stage: int, leak: Leak) -> None:
        """Seek, of what is sought from coarse to fine, what the ``stage`` adds; none does after the last."""
        if stage < len(self.stages):
            self.focus(*self.stages[stage])

    def focus(self, most: float, sharpness: float) -> None:
        """Seek frequencies up to ``most`` periods a side of what is not fine yet, with maxima so sharp."""
        coarse = self.coarse.to(self.passband.device)
        shown = (self.spectrum.frequency <= most) | ~coarse.view(-1, 1, 1, 1, 1)
        self.passband = shown.to(self.passband)
        self.sharpness = torch.where(coarse, sharpness, POOL).to(self.sharpness)
        sought = (self.active & self.coarse).to(self.best_objective.device)
        self.best_objective[sought] = torch.inf  # of other images

    def reconstructed(self, dummies: Tensor) -> Tensor:
        """At a contrast that is likely, where it is hidden."""
        return self.shown(self.pixels(dummies))

    def shown(self, images: Tensor) -> Tensor:
        """``images`` at a contrast that is likely, where it is hidden.

        The gradient is nearly the same for any about the middle, as that is what convolutions pad with.
        """
        return likely(images, self.network, self.variances, self.noisy) if self.hidden else images
