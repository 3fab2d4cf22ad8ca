"""Images from a deep network's gradient, one block after another, from the head down.

A block is what lies between two forks: nodes that all of the network passes, and that branches leave from.
What a block takes is sought as that on which it gives what was found above, and on which its weights have
the gradients that were leaked.  A block is as shallow as a small network, and a closure of it costs its share
only.  Where batch norm tells how a channel's values are distributed, they are sought so.  What was measured
is told in docs/tried.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.passes.shape_prop import ShapeProp

from dlgbench.batchnorm import DIMENSIONS, BatchNorm2d
from dlgbench.inversion import invert, trunk
from dlgbench.leak import Leak, Tensors, relative_square
from dlgbench.linesearch import backtracking
from dlgbench.optim import LBFGS
from dlgbench.prepare import ACTIVATIONS, Network
from dlgbench.softening import soft_max_pool, softened

ALONE, TOGETHER = 40, 60
"""Iterations of L-BFGS on a block alone, and then together with those above it."""
BLOCKS = 3
"""How many those are with it: what a maximum above passes on is right once it is at the right place."""
HISTORY = 50
ITERATIONS = 15
"""Of L-BFGS on the images, on each level of sharpness."""

PASSED = torch.cat, soft_max_pool
"""What passes channels on; those of a maximum are not distributed as they were."""

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Units:
    """How a node's values follow from unknowns that may be any numbers."""

    activation: Transform
    normed: Tensor
    """Whether a channel comes from a batch norm, ``(channel, 1, 1)``, as are the norm's weight and bias."""
    weight: Tensor
    bias: Tensor

    def __call__(self, unknown: Tensor) -> Tensor:
        """The values, ``(image, channel, height, width)`` as are the unknowns."""
        normal = F.batch_norm(unknown, None, None, training=True) * self.weight + self.bias
        return self.activation(torch.where(self.normed, normal, unknown))


class Known(NamedTuple):
    """What was found of a fork."""

    value: Tensor
    slope: Tensor
    """The loss's gradient there."""


class Descent:
    """The way down a network on the leak of one case, its kinks softened.

    The ``leak`` holds every buffer, masks included; ``labels`` are probabilities, ``(image, class)``.
    The gradients of the weights that ``counted`` names are matched.  ``tell`` hears every objective, and
    once it is ``late`` no more is sought.
    """

    def __init__(
        self,
        network: Network,
        leak: Leak,
        labels: Tensor,
        counted: Iterable[str],
        tell: Callable[[float], None] = lambda objective: None,
        late: Callable[[], bool] = lambda: False,
    ) -> None:
        soft = softened(network)
        assert isinstance(soft.body, fx.GraphModule)
        self.network, self.body, self.labels = soft, soft.body, labels
        self.tell, self.late = tell, late
        self.true, self.leak = network, leak
        self.state = {name.removeprefix("body."): t for name, t in (leak.weights | leak.buffers).items()}
        self.wanted = {name.removeprefix("body."): leak.gradients[name] for name in counted}
        self.forks = forks(soft)
        known = (n.target for n in self.body.graph.nodes if n.target in ACTIVATIONS.values())
        self.activation = next(known, None)
        self.known: dict[fx.Node, Known] = {}

    def images(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Images ``(image, channel, height, width)``, in [0, 1] or near, from random values of every fork.

        None where there is no fork or it is not known how its values are distributed, of a bottleneck, and
        where it is late.  Matched is the fork so many `BLOCKS` above the lowest: what follows there from
        what was found of that is less noisy than either was when it was found.
        """
        spaces = [self.units(fork) for fork in self.forks]
        head = self.body.get_submodule(str(self.network.head_nodes[0].target))
        if not spaces or None in spaces or not isinstance(head, nn.Linear):
            return None
        ShapeProp(self.body).propagate(torch.zeros(shape).to(self.network.mean))
        for index, space in enumerate(spaces):
            assert space is not None
            size = self.forks[index].meta["tensor_meta"].shape
            random = torch.randn(size, generator=generator).to(self.network.mean)
            self._look_up(index, space(self._find(index, space, random)))
        if self.late():
            return None
        end = max(0, len(self.forks) - 1 - BLOCKS)
        known = {forks(self.true)[end]: self.known[self.forks[end]].value}
        return invert(self.true, self.leak, known, shape, ITERATIONS, self.tell)

    def units(self, node: fx.Node) -> Units | None:
        """How the values of ``node`` follow from unknowns, if it is known."""
        channels = self._channels(node)
        if channels is None:
            return None
        normed, weight, bias = channels[:, :, None, None]
        return Units(cast(Transform, self.activation), normed > 0, weight, bias)

    def _channels(self, node: fx.Node) -> Tensor | None:
        """Whether each channel of ``node`` is normed, and the norm's weights and biases, ``(3, channel)``."""
        each = [self._channels(source) for source in node.all_input_nodes] if node.target in PASSED else []
        if each and all(part is not None for part in each):
            joined = torch.cat([part for part in each if part is not None], 1)
            return joined if node.target is torch.cat else torch.zeros_like(joined)
        norm = node.all_input_nodes[0].target if node.target is self.activation else None
        if not isinstance(norm, str) or not isinstance(self.body.get_submodule(norm), BatchNorm2d):
            return None
        weight = self.state[f"{norm}.weight"]
        return torch.stack([torch.ones_like(weight), weight, self.state[f"{norm}.bias"]])

    def _find(self, index: int, space: Transform, unknown: Tensor) -> Tensor:
        """The unknowns of fork ``index``."""
        for blocks, iterations in ((1, ALONE), (BLOCKS, TOGETHER)):
            if self.late():
                break
            unknown = minimise(self._objective(index, space, blocks), unknown, iterations, self.tell)
        return unknown

    def _objective(self, index: int, space: Transform, blocks: int) -> Transform:
        """The mean of the relative squares of what so many blocks' gradients and output are missed by."""
        begin = self.forks[index]
        end = self.forks[index - blocks] if index >= blocks else None
        part = trunk(self.body, [end] if end else self._heads(begin), begin)
        names = [name for name, _ in part.named_parameters() if name in self.wanted]

        def objective(unknown: Tensor) -> Tensor:
            leaves = {name: self.state[name].detach().requires_grad_() for name in names}
            outputs = self._run(part, space(unknown), leaves)
            loss = (outputs[0] * self.known[end].slope).sum() if end else self._loss(outputs)
            ours = torch.autograd.grad(loss, [*leaves.values()], create_graph=True)
            misfits = [relative_square(a, self.wanted[name]) for name, a in zip(names, ours, strict=True)]
            return torch.stack(misfits + ([_ahead(outputs[0], self.known[end].value)] if end else [])).mean()

        return objective

    def _look_up(self, index: int, value: Tensor) -> None:
        """What follows for fork ``index`` and those above it from the ``value`` there."""
        above = self.forks[: index + 1]
        part = trunk(self.body, [*above, *self._heads(above[-1])], above[-1])
        with torch.enable_grad():
            outputs = self._run(part, value.requires_grad_(), {})
            slopes = torch.autograd.grad(self._loss(outputs[len(above) :]), outputs[: len(above)])
        self.known = {fork: Known(outputs[i].detach(), slopes[i]) for i, fork in enumerate(above)}

    def _run(self, part: fx.GraphModule, inputs: Tensor, leaves: Tensors) -> tuple[Tensor, ...]:
        own = (name for kind in (part.named_parameters(), part.named_buffers()) for name, _ in kind)
        state = {name: self.state[name] for name in own} | leaves
        outputs: tuple[Tensor, ...] = functional_call(part, state, (inputs,))
        return outputs

    def _heads(self, begin: fx.Node) -> list[fx.Node]:
        """The layers of logits that depend on ``begin``, as the first does on every fork."""
        return [head for head in self.network.head_nodes if begin in ancestors(head)]

    def _loss(self, logits: Sequence[Tensor]) -> Tensor:
        each = zip(self.network.heads, logits, strict=False)
        return torch.stack([w * F.cross_entropy(head, self.labels) for w, head in each]).sum()


def forks(network: Network) -> list[fx.Node]:
    """Nodes that all of ``network`` passes to its first head and that branches leave from, topmost first."""
    assert isinstance(network.body, fx.GraphModule)
    head = network.head_nodes[0]
    needed = ancestors(head) | {head}
    found, waiting = list[fx.Node](), dict[fx.Node, set[fx.Node]]()
    for node in network.body.graph.nodes:
        if node in needed:
            waiting = {source: rest for source, users in waiting.items() if (rest := users - {node})}
            waiting[node] = needed & set(node.users)
            if len(waiting) == 1 and len(waiting[node]) > 1 and node.op != "placeholder":
                found.append(node)
    return found[::-1]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All that ``node`` is computed from."""
    found, left = set[fx.Node](), [node]
    while left:
        new = set(left.pop().all_input_nodes) - found
        found |= new
        left += new
    return found


def minimise(objective: Transform, start: Tensor, iterations: int, tell: Callable[[float], None]) -> Tensor:
    """Where L-BFGS gets to from ``start`` by steps that never climb."""
    unknown = start[None].clone().requires_grad_()
    optimizer = LBFGS(
        [unknown], max_iter=iterations, history_size=HISTORY, line_search=backtracking,
        tolerance_grad=0.0, tolerance_change=0.0, tolerance_curvature=0.0,
    )  # fmt: skip

    def closure() -> Tensor:
        value = objective(unknown[0])
        (unknown.grad,) = torch.autograd.grad(value, unknown)
        tell(float(value.detach()))
        return value.detach()[None]

    optimizer.step(closure)
    return unknown[0].detach()


def _ahead(ours: Tensor, theirs: Tensor) -> Tensor:
    """The relative square of what a fork's value is missed by: of its size without each channel's mean."""
    return (ours - theirs).square().sum() / (theirs - theirs.mean(DIMENSIONS, keepdim=True)).square().sum()
