"""How much contrast images have where batch norm divides by it: a guess, and what the gradient tells.

Batch norm hides how much its inputs vary, but for the epsilon that it adds to their variance.  Of the weights
W of a channel of the convolution before it, the loss L sees but  (W x - mean) / sqrt(variance + epsilon).
Where W is multiplied by 1 + t, that changes by  t epsilon / (variance + epsilon)  of itself, so that

    W . dL/dW  =  gamma dL/dgamma  epsilon / (variance + epsilon)

with the norm's weight gamma, and all of that but the variance is known.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from dlgbench.batchnorm import BatchNorm2d
from dlgbench.convolution import Conv2d
from dlgbench.leak import Leak
from dlgbench.prepare import Network

CLIPPED = 0.02
"""The share of pixels that may lie beyond black and white."""
SPREAD = 0.5
"""How far a variance is from the guessed one: the standard deviation of its natural logarithm."""
WHITE = 0.1
"""What share of the variance is noise, not found or found and not there: its standard deviation."""


def widest(deviations: Tensor, middle: Tensor) -> Tensor:
    """By what to multiply each case's ``deviations`` from the ``middle``, ``(case, 1, 1, 1, 1)``.

    The factor that leaves all but `CLIPPED` of the pixels in [0, 1]; 1 where there is nothing to multiply.
    ``deviations`` are ``(case, image, channel, height, width)``, ``middle`` one number a channel.
    """
    room = torch.where(deviations < 0, middle, 1 - middle) / deviations.abs()
    room = torch.where(room > 0, room, torch.inf)  # of what is outside at any factor
    factor = torch.quantile(room.flatten(1), CLIPPED, dim=1).view(-1, 1, 1, 1, 1)
    return torch.where(factor.isfinite(), factor, 1)


def likely(images: Tensor, network: Network, variances: Told | None, followed: Tensor) -> Tensor:
    """``images`` at the contrast about ``network.mean`` that fills their range, or that ``variances`` tell.

    They are ``(case, image, channel, height, width)``, meant to lie in [0, 1].  What the variances tell, if
    they do, is ``followed`` of some cases, ``(case,)``.
    """
    deviations = images - network.mean
    deviations = widest(deviations, network.mean) * deviations
    if variances is not None:
        shown = (network.mean + deviations).clamp(0, 1)  # beyond are outliers, which would count most
        factor = variances.factor(network.normalise(shown))
        deviations = torch.where(followed.to(factor.device).view_as(factor), factor, 1) * deviations
    return network.mean + deviations


class Told(NamedTuple):
    """What clients' gradients tell of the variances by which their first batch norm divides.

    The last three are ``(case, channel)`` and of double precision.
    """

    layer: nn.Module
    """The convolution before it."""
    weights: Tensor
    """Of that, ``(case, channel, …)``."""
    epsilon: float
    along: Tensor
    """``W . dL/dW``."""
    through: Tensor
    """``epsilon gamma dL/dgamma``."""
    rounding: Tensor
    """``|W| |dL/dW|``, to which errors of ``along`` are in proportion."""

    def factor(self, images: Tensor) -> Tensor:
        """By what to multiply each case's ``images``, as the network normalises them, ``(case, 1, 1, 1, 1)``.

        The (geometric) mean of what is likely, if their contrast was guessed with an error of `SPREAD`.
        """
        factors = [self._factor(case, some) for case, some in enumerate(images)]
        return torch.tensor(factors).to(images).view(-1, 1, 1, 1, 1)

    def _factor(self, case: int, images: Tensor) -> float:
        some = self.rounding[case] > 0
        outputs = functional_call(self.layer, {"weight": self.weights[case]}, (images,))
        found = outputs.double().var((0, 2, 3), correction=0)[some]
        if not found.any():
            return 1.0
        white = self.weights[case].double().flatten(1).square().sum(1)[some]
        white *= found.mean() / white.mean()
        logs = torch.linspace(-4 * SPREAD, 4 * SPREAD, 161).to(found)[:, None]
        shares = torch.linspace(-WHITE, 3 * WHITE, 41).to(found)
        variances = logs.exp()[..., None] * (found + shares[:, None] * white)
        prior = (logs / SPREAD).square() + (shares / WHITE).square()
        likely = (self._evidence(case, some, variances) - prior / 2).flatten().softmax(0)
        return float(((likely.view_as(prior) * logs).sum() / 2).exp())

    def _evidence(self, case: int, some: Tensor, variances: Tensor) -> Tensor:
        """The logarithm of the likelihood of ``variances``, ``(…, channel)``.

        Errors are normal, those of a channel in proportion to its rounding, at an unknown scale, over which
        is integrated (Jeffreys' prior).
        """
        missed = self.along[case, some] - self.through[case, some] / (variances + self.epsilon)
        missed /= self.rounding[case, some]
        squares = missed.square().sum(-1).clamp_min(torch.finfo(missed.dtype).tiny)
        return torch.where((variances > 0).all(-1), -variances.shape[-1] / 2 * squares.log(), -torch.inf)


def told(network: Network, leak: Leak) -> Told | None:
    """What ``leak`` tells of every case, unless ``network`` begins otherwise than with these two layers."""
    layers = _first(network)
    if layers is None:
        return None
    conv, norm = (f"{name}.weight" for name in layers)
    weights, gradients = leak.weights[conv], leak.gradients[conv].double()
    layer, batchnorm = map(network.get_submodule, layers)
    epsilon = cast(BatchNorm2d, batchnorm).eps
    return Told(
        layer, weights, epsilon,
        along=(weights.double() * gradients).flatten(2).sum(2),
        through=epsilon * leak.weights[norm].double() * leak.gradients[norm].double(),
        rounding=weights.double().flatten(2).norm(dim=2) * gradients.flatten(2).norm(dim=2),
    )  # fmt: skip


def _first(network: Network) -> list[str] | None:
    """The names of the convolution of the images and of the batch norm behind it."""
    assert isinstance(network.body, fx.GraphModule)
    names, node = list[str](), next(n for n in network.body.graph.nodes if n.op == "placeholder")
    for kinds in ((Conv2d, nn.Conv2d), (BatchNorm2d,)):
        node, *others = node.users
        name = f"body.{node.target}"
        if others or node.op != "call_module" or type(network.get_submodule(name)) not in kinds:
            return None
        names.append(name)
    return names
