"""What makes a classifier a subject of gradient leakage: normalisation, activation, init, dropout."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dlgbench import dense
from dlgbench.errors import UsageError, unknown
from dlgbench.stochastic import DIVERGENCE, Bottleneck, Stochastic, divergence

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "relu": F.relu, "tanh": torch.tanh,
    "softplus": F.softplus, "silu": F.silu, "gelu": F.gelu,
}  # fmt: skip


class Network(nn.Module):
    """A classifier whose first layer normalises pixels in [0, 1] and which has one head or more.

    ``heads`` are the weights of the heads' cross entropies in the loss; ``mask_known`` says whether
    the attacker is given the victim's dropout masks.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        heads: tuple[float, ...] = (1.0,),
        mask_known: bool = False,
    ) -> None:
        super().__init__()
        self.body = body
        self.heads = heads
        self.mask_known = mask_known
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits ``(image, class)`` of every head, for images ``(image, channel, height, width)``.

        Behind them, where the head is behind a bottleneck, the code in it.
        """
        logits = dense.run(self.body, self.normalise(images))
        return tuple(logits) if isinstance(logits, tuple) else (logits,)

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] as the body takes them."""
        return (images - self.mean) / self.std

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        """Black and white as the body takes them, ``(channel, 1, 1)`` each."""
        return self.normalise(torch.zeros_like(self.mean)), self.normalise(torch.ones_like(self.mean))

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Mean cross entropy against label probabilities ``(image, class)``, summed over the heads.

        Plus the divergence of the code in a bottleneck, of which the outputs behind the heads' are.
        """
        logits, codes = outputs[: len(self.heads)], outputs[len(self.heads) :]
        terms = [w * F.cross_entropy(head, labels) for w, head in zip(self.heads, logits, strict=True)]
        return torch.stack(terms + [DIVERGENCE * divergence(code) for code in codes]).sum()

    @property
    def head_nodes(self) -> list[fx.Node]:
        """The last layers before every head's logits, in the body's graph."""
        assert isinstance(self.body, fx.GraphModule)  # what `replace_activation` returns
        node: fx.Node = next(node for node in self.body.graph.nodes if node.op == "output")
        while node.all_input_nodes[0].op != "call_module":
            node = node.all_input_nodes[0]
        return node.all_input_nodes

    @cached_property
    def head(self) -> str:
        """The name of the linear layer that gives the logits: of several heads, the first."""
        name = f"body.{self.head_nodes[0].target}"
        return f"{name}.head" if isinstance(self.get_submodule(name), Bottleneck) else name

    @cached_property
    def has_masks(self) -> bool:
        """Whether `draw_masks` gives any."""
        return any(isinstance(layer, Stochastic) for layer in self.modules())

    def draw_masks(self, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh draws for so many images, of every layer that draws, by the name of its buffer."""
        return {
            f"{name}.mask": layer.draw(images, generator)
            for name, layer in self.named_modules()
            if isinstance(layer, Stochastic)
        }


MODULES: dict[type[nn.Module], str] = {
    nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.Softplus: "softplus", nn.SiLU: "silu", nn.GELU: "gelu",
}  # fmt: skip


class _Swap(fx.Transformer):
    """Replaces ReLU, as a module and as a function; bound to an activation by `replace_activation`.

    Other activations of torch's defaults become the functions that attacks know.
    """

    activation: Callable[[Tensor], Tensor]

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.submodules[target]
        if isinstance(module, nn.ReLU):
            return self.activation(args[0])
        if isinstance(module, nn.Hardsigmoid):
            return _hardsigmoid(args[0])
        if (name := MODULES.get(type(module))) and str(module) == str(type(module)()):
            return ACTIVATIONS[name](args[0])
        if isinstance(module, nn.LogSoftmax):  # behind a head: its own cross entropy is that of the logits
            return super().call_function(torch.log_softmax, args, {"dim": module.dim})
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in (F.relu, torch.relu, torch.relu_):
            return self.activation(args[0])
        if target is F.hardsigmoid:
            return _hardsigmoid(args[0])
        return super().call_function(target, args, kwargs)


def _hardsigmoid(features: Any) -> Any:
    """PyTorch's own has no second derivative."""
    return (features / 6 + 0.5).clamp(0, 1)


def replace_activation(body: nn.Module, activation: str) -> nn.Module:
    """``body`` with every ReLU replaced, by a graph transformation; parameters keep their names."""
    swap = _Swap(fx.symbolic_trace(body))
    swap.activation = ACTIVATIONS[activation]
    return swap.transform()


def swap(root: nn.Module, kind: type[nn.Module], replace: Callable[..., nn.Module]) -> None:
    """Put what ``replace`` makes of it in the place of every layer of this very ``kind``."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, replace(child))


def probe(network: Network, shape: tuple[int, ...]) -> None:
    """Run the network on tensors without storage: raises what it raises, and notes the shapes of draws."""
    ghost = copy.deepcopy(network).to("meta")
    ghost(torch.empty(shape, device="meta", dtype=network.mean.dtype))
    for layer, noted in zip(network.modules(), ghost.modules(), strict=True):
        if isinstance(layer, Stochastic) and isinstance(noted, Stochastic):
            layer.shape = noted.shape


def initialise(network: Network, init: str, activation: str) -> None:
    """Draw the weights: ``default`` (as built), ``uniform:BOUND`` or ``variance_preserving``."""
    name, colon, bound = init.partition(":")
    if name not in ("default", "uniform", "variance_preserving") or (colon and name != "uniform"):
        raise unknown("init", init, ("default", "uniform:BOUND", "variance_preserving"))
    if name == "uniform":
        _uniform(network, bound)
    elif name == "variance_preserving":
        _variance_preserving(network, activation)


def _uniform(network: Network, text: str) -> None:
    """All weights and biases uniform in ±bound, as in Zhu et al.'s code for their LeNet (0.5)."""
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if not 0 < bound < math.inf:
        raise UsageError(f"init: expected uniform:BOUND with a positive number, got 'uniform:{text}'")
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -bound, bound)


def _variance_preserving(network: Network, activation: str) -> None:
    """Weights N(0, 1 / (fan_in E[f(z)^2])), zero biases: pre-activations stay N(0, 1) with depth.

    The fixed point q* = 1 of Poole et al. 2016, "Exponential expressivity in deep neural networks
    through transient chaos", equation 3, with the expectation by Gauss-Hermite quadrature.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    values = ACTIVATIONS[activation](torch.from_numpy(nodes)).numpy()
    second_moment = float(weights @ values**2 / weights.sum())
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=(second_moment * layer.weight[0].numel()) ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
