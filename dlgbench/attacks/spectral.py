"""The strongest attack of this package: what can be solved is solved, the rest is matched by frequencies.

What it combines is told in docs/attacks.md, what was measured of each part in docs/tried.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from dlgbench import topdown
from dlgbench.attacks.base import Task
from dlgbench.attacks.frequencies import Frequencies
from dlgbench.closures import Values
from dlgbench.denoising import denoised
from dlgbench.inversion import trunk
from dlgbench.labels import factor
from dlgbench.leak import Leak, gradients, relative_square, statistics
from dlgbench.peeling import peel
from dlgbench.prepare import Network
from dlgbench.registry import ATTACKS

MISFIT, SMOOTHING = 2.5, 0.4
"""How strongly to smooth, in deviations of the image, where the relative distance of the gradient, rooted, is
1, in proportion where it is less, and at most.  Measured on resnet18: docs/tried.md."""


@ATTACKS.register(
    "spectral",
    labels="recovered first, by counts",
    priors="smooth and pale where the gradient leaves it open, range of pixels, patches alike from 56 px on",
    ahead={
        "default": 500,
        "network=inception_v3": 500,
        "network.batchnorm=train": 0,
        "network.batchnorm=shared": 0,
        "network.batchnorm=eval": 500,
        "network.activation=relu": 2000,
        "network=lenet5": 2000,
    },
    revision={
        "defense=clip,batch=1": 11,
        "defense=local,batch=1": 11,
        "default": 4,
        "network=inception_v3": 9,
        "network.batchnorm=train": 8,
        "network.batchnorm=shared": 8,
        "network.batchnorm=eval,network.activation=relu,defense=none": 12,
        "network.batchnorm=eval": 13,
        "network=lenet_dlg,network.activation=relu": 6,
        "network.activation=relu": 5,
        "network=lenet_dlg,network.activation=sigmoid": 4,
        "channels=1,batch=1": 7,
        "resolution=16,batch=1": 7,
    },
    positive=("learning_rate", "history", "iterations"),
)
class Spectral(Frequencies):
    """First what can be solved for; then every layer's relative distance, from coarse to fine.

    What cannot be is sought block after block, where it is known how the blocks' inputs are distributed.
    A gradient of one image that was multiplied, as by clipping, is divided by what its head tells first.

    Of what goes from coarse to fine, by what the softened network errs on what has been found, the target
    errs too, anew at every stage (defect correction: Stetter 1978, "The defect correction principle and
    discretization methods").  Between stages noise is taken out of what is matched: what patches nearby,
    which are nearly alike, do not have in common.
    """

    def __init__(
        self,
        network: Network,
        task: Task,
        *,
        learning_rate: float = 1.0,
        history: int = 100,
        iterations: int = 20,
    ) -> None:
        super().__init__(network, task, learning_rate=learning_rate, history=history, iterations=iterations)
        assert isinstance(network.body, fx.GraphModule)
        main = trunk(network.body, network.head_nodes[:1])
        self.main = {f"body.{name}" for name, _ in main.named_parameters()}
        self.target: Leak | None = None
        """What is matched, where that is not the leak itself."""
        self.factors: Tensor | None = None
        """By what every case's gradients have been multiplied, ``(case,)``; None where none were."""
        self._divided: tuple[Leak, Leak] | None = None

    def solve(self, leak: Leak) -> None:
        """The better of two starts by objective: what is solved for, or found block by block, and grey."""
        self.find_factors(leak)
        solved, labels = self.dummy_images.detach().clone(), self.dummy_labels.detach()
        open_ = torch.ones(len(solved), dtype=torch.bool)
        for case, image in peel(self.network, self.divided(leak), solved.shape[1:], self.tell):
            solved[case], open_[case] = self.coefficients(image), False
        self.descend(leak, solved, open_.nonzero().squeeze(1).tolist())
        if not torch.equal(solved, self.dummy_images):
            grey, ours = (
                self.evaluate(start, labels, leak).objective for start in (self.dummy_images, solved)
            )
            better = (ours < grey).cpu()
            self.dummy_images[better] = solved[better]
            self.coarse &= ~better  # the others are fine already
            self.noisy &= ~better | open_
            self.closures += 2

    def find_factors(self, leak: Leak) -> None:
        """Note by what single images' gradients were multiplied: what is seen from now on is `divided`."""
        cases = range(len(self.dummy_images) if self.dummy_images.shape[1] == 1 else 0)
        factors = [factor(self.network, leak.row(case)) for case in cases]
        some = any(found != 1 for found in factors)
        self.factors = torch.tensor(factors).to(self.dummy_images) if some else None

    def divided(self, leak: Leak) -> Leak:
        """``leak`` before its gradients were multiplied, copied once for every leak."""
        if self.factors is None:
            return leak
        if self._divided is None or self._divided[0] is not leak:
            parts = {n: g / self.factors.view(-1, *(1,) * (g.dim() - 1)) for n, g in leak.gradients.items()}
            self._divided = leak, leak._replace(gradients=parts)
        return self._divided[1]

    def evaluate(self, dummies: Tensor, labels: Tensor, leak: Leak) -> Values:
        """As every attack's, of the `target`."""
        return super().evaluate(dummies, labels, self.target or leak)

    def seen(self, leak: Leak, rows: list[int], wanted: int | None = None) -> Leak:
        """As every such attack sees it, but `divided`."""
        return super().seen(self.divided(leak), rows, wanted)

    def descend(self, leak: Leak, found: Tensor, rows: Sequence[int]) -> None:
        """Put into ``found`` what block after block is found of the cases ``rows``, from the head down."""
        for row in rows:
            seen, labels = self.seen(leak, [row]).row(0), self.dummy_labels[row].softmax(-1)
            counted = self.counted(seen)
            descent = topdown.Descent(self.network, seen, labels, counted, self.tell, self.late)
            images = descent.images(found.shape[1:], self.generators[row])
            found[row] = found[row] if images is None else self.coefficients(images)

    def counted(self, leak: Leak) -> list[str]:
        """The weights of which the distance is."""
        return [name for name, g in leak.gradients.items() if g.dim() > 1 and name in self.main]

    def distance(self, images: Tensor, labels: Tensor, leak: Leak) -> Tensor:
        """The mean of ``|g - g*|^2 / |g*|^2`` over the weights of convolutions and linear layers.

        Biases and batch norm's parameters hold few numbers, sums over all positions, and would weigh
        as much as whole layers.  Layers that only an auxiliary head needs do not count: batch norm over
        its few positions passes on little but signs, which softened maxima get wrong.
        A batch's statistics count as weights do, where the client shares them.
        """
        ours = self.answer(self.soft, images, labels.softmax(-1), leak)
        pairs = [(ours.gradients[name], leak.gradients[name]) for name in ours.gradients]
        pairs += [(ours.buffers[name], leak.buffers[name]) for name in ours.buffers]
        return torch.stack([relative_square(a, b) for a, b in pairs]).mean()

    def answer(self, network: Network, images: Tensor, labels: Tensor, leak: Leak) -> Leak:
        """What the `distance` is of, of one case: gradients of weights, and statistics that are shared."""
        ours = gradients(network, leak.weights, leak.buffers, images, labels)
        seen = statistics(network, leak.weights, leak.buffers, images)
        return leak._replace(gradients={name: ours[name] for name in self.counted(leak)}, buffers=seen)

    def begin(self, stage: int, leak: Leak) -> None:
        """Seek what the ``stage`` adds without noise in what has been found, of a target that errs by it."""
        if stage:
            self.smooth()
        super().begin(stage, leak)
        if stage:
            self.correct(leak)

    @torch.no_grad()
    def smooth(self) -> None:
        """Go on without the noise in what is sought from coarse to fine."""
        found = self.coefficients(self.clean(self.dummy_images))
        sought = self.active & self.coarse
        moved = (self.passband > 0) & sought.to(self.passband.device).view(-1, 1, 1, 1, 1)
        self.dummy_images.copy_(torch.where(moved, found, self.dummy_images))
        for row in sought.nonzero().squeeze(1).tolist():
            self.lbfgs.moved(row)

    def clean(self, dummies: Tensor) -> Tensor:
        """`pixels` without noise: the less is taken out, the closer the gradient is.

        What a gradient tells badly a descent leaves at random, and of that it rarely finds its way back.
        """
        images = self.pixels(dummies)
        if not self.noisy.any():
            return images
        deviations = images - self.middle
        strength = (MISFIT * self.best_objective.sqrt()).clamp(max=SMOOTHING)
        strength = torch.where(self.noisy.to(strength.device), strength, 0)
        strengths = strength[:, None] * deviations.flatten(2).std(2)
        return self.middle + denoised(deviations.flatten(0, 1), strengths.flatten()).view_as(images)

    @torch.no_grad()
    def correct(self, leak: Leak) -> None:
        """Make the target of what is sought err as the softened network does on what has been found."""
        rows = (self.active & self.coarse).nonzero().squeeze(1).tolist()
        self.target = (self.target or leak).replaced({row: self.erring(leak, row) for row in rows})
        self.closures[rows] += 1
        self.best_objective[rows] = torch.inf  # of another target
        for row in rows:
            self.lbfgs.moved(row)

    def erring(self, leak: Leak, row: int) -> Leak:
        """What the client of this ``row`` would have shared, had it erred so."""
        (_, *shared), (_, *soft), (_, *hard) = leak.row(row), *self.answers(leak, row)
        factors = 1, 1 if self.factors is None else self.factors[row]
        parts = zip(shared, soft, hard, factors, strict=True)
        return Leak({}, *({n: ours[n] + t * (a[n] - b[n]) for n in a} for ours, a, b, t in parts))

    def answers(self, leak: Leak, row: int) -> tuple[Leak, Leak]:
        """What clients of the softened and of the true network would tell of what has been found."""
        image, labels = self.pixels(self.dummy_images)[row], self.dummy_labels[row].softmax(-1)
        seen = self.seen(leak, [row]).row(0)
        soft, hard = (self.answer(network, image, labels, seen) for network in (self.soft, self.network))
        return soft, hard

    def reconstructed(self, dummies: Tensor) -> Tensor:
        """Without noise, and where contrast is hidden with one that is likely."""
        return self.shown(self.clean(dummies))

    def matched(self, dummies: Tensor) -> Tensor:
        """As it is before noise is taken out."""
        return super().reconstructed(dummies)
