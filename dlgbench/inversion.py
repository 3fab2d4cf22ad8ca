"""An image from what a network computes on it.

Mahendran and Vedaldi 2015, "Understanding deep image representations by inverting them", over frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch.func import functional_call

from dlgbench.batchnorm import DIMENSIONS, BatchNorm2d
from dlgbench.leak import Leak
from dlgbench.prepare import Network
from dlgbench.softening import RELU, bent, level_max_pool
from dlgbench.spectrum import CONTRAST, Spectrum

SOFTEST, SHARPEST, LEVELS = 0.5, 16.0, 8
"""The sharpness of maxima, from level to level by the same factor.  Which of nine positions is the largest is
what a descent cannot revise; measured, as all here, on resnet18 at 224 px: docs/tried.md."""
PRIOR, FALL = 0.05, 1.0
"""The weight of how large coefficients are for photos, which fall so fast with frequency, where nothing
matched of a layer counts as 1."""
ITERATIONS, HISTORY = 100, 50
"""Of L-BFGS on each level."""
FIRST = 0.01
"""Of what a photo's coefficients are, those that images begin with whose contrast is held."""

Part = Callable[[tuple[Tensor]], Sequence[Tensor]]
"""What a softened network computes of an image."""


def invert(
    network: Network,
    leak: Leak,
    values: Mapping[fx.Node, Tensor],
    shape: tuple[int, ...],
    iterations: int = ITERATIONS,
    tell: Callable[[float], None] = lambda objective: None,
) -> Tensor:
    """Images ``shape``, in [0, 1] or near, on which nodes of the network's body have these ``values``.

    By L-BFGS from grey while maxima sharpen, so many ``iterations`` on each level, with the weights and
    buffers of one case's ``leak``.  Each on its own, unless the network mixes them by the batch's statistics.
    Those hide contrast and mean, which are then a photo's and the network's.  ``tell`` hears every objective.
    """
    assert isinstance(network.body, fx.GraphModule)
    ends = frontier(network.body, values)
    part, shared = trunk(network.body, ends), leak.weights | leak.buffers
    state = {name: shared[f"body.{name}"] for name in part.state_dict()}
    levels = torch.logspace(math.log10(SOFTEST), math.log10(SHARPEST), LEVELS).tolist()
    parts = [partial(functional_call, bent(part, RELU, level, level_max_pool), state) for level in levels]
    wanted = [values[end].to(network.mean) for end in ends]
    if any(type(layer) is BatchNorm2d for layer in part.modules()):
        return _sought(Hidden(network, shape), parts, wanted, iterations, tell)
    each = zip(*(value.unsqueeze(1) for value in wanted), strict=True)
    return torch.cat([_sought(Open(network, (1, *shape[1:])), parts, one, iterations, tell) for one in each])


class Open:
    """Images over coefficients times the root of photos' amplitudes; both and pixels are worse scaled."""

    def __init__(self, network: Network, shape: tuple[int, ...]) -> None:
        self.network = network
        self.spectrum = Spectrum(shape[1:], network.mean, FALL)
        self.root = self.spectrum.amplitude.sqrt()
        self.start = torch.zeros(shape).to(network.mean)

    def pixels(self, unknown: Tensor) -> tuple[Tensor, Tensor]:
        """The images, and how unlike a photo's they are: the mean square of the coefficients."""
        coefficients = unknown / self.root
        deviations = CONTRAST * self.spectrum.usual * self.spectrum.images(coefficients)
        return 0.5 + deviations, coefficients.square().mean()

    def size(self, value: Tensor) -> Tensor:
        """The square of what has to be matched of a node's ``value``."""
        return value.square().sum()


class Hidden(Open):
    """The same where batch norm hides contrast and mean: they are held, or a prior would take them away."""

    def __init__(self, network: Network, shape: tuple[int, ...]) -> None:
        super().__init__(network, shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.start = FIRST * self.root * noise.to(network.mean)  # grey has no contrast to hold

    def pixels(self, unknown: Tensor) -> tuple[Tensor, Tensor]:
        images, square = super().pixels(unknown)
        deviations = (images - images.mean(DIMENSIONS, keepdim=True)) / CONTRAST
        contrast = deviations.square().mean()
        return self.network.mean + CONTRAST * deviations / contrast.sqrt(), square / contrast

    def size(self, value: Tensor) -> Tensor:
        return (value - value.mean(DIMENSIONS, keepdim=True)).square().sum()


def _sought(
    space: Open,
    parts: Sequence[Part],
    wanted: Sequence[Tensor],
    iterations: int,
    tell: Callable[[float], None],
) -> Tensor:
    """The images on which the last of the parts gives what is ``wanted``, each begun where the last ended."""
    sizes = [space.size(value) for value in wanted]
    unknown = space.start.clone().requires_grad_()

    def objective(part: Part) -> Tensor:
        images, unlike = space.pixels(unknown)
        found = part((space.network.normalise(images),))
        misfits = [(a - b).square().sum() / size for a, b, size in zip(found, wanted, sizes, strict=True)]
        value = torch.stack(misfits).sum() + PRIOR * unlike
        tell(float(value.detach()))
        return value

    for part in parts:
        descend(partial(objective, part), unknown, iterations=iterations, history=HISTORY)
    return space.pixels(unknown)[0].detach()


def descend(objective: Callable[[], Tensor], unknown: Tensor, *, iterations: int, history: int) -> None:
    """Move the leaf ``unknown`` to where an objective of it is low, by L-BFGS to the end of its means.

    Those are its ``iterations`` and on average two closures for each.
    """
    optimizer = torch.optim.LBFGS(
        [unknown], max_iter=iterations, max_eval=2 * iterations, history_size=history,
        tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        value = objective()
        (unknown.grad,) = torch.autograd.grad(value, unknown)
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]


def frontier(body: fx.GraphModule, values: Mapping[fx.Node, Tensor]) -> list[fx.Node]:
    """Those nodes of known value that other known ones do not determine."""
    open_: set[fx.Node] = set()
    for node in body.graph.nodes:
        sources = node.all_input_nodes
        if not sources or any(source in open_ and source not in values for source in sources):
            open_.add(node)
    return [node for node in values if node in open_]


def trunk(body: fx.GraphModule, ends: Sequence[fx.Node], begin: fx.Node | None = None) -> fx.GraphModule:
    """``body`` from its input, or from the node ``begin``, to the nodes ``ends``, all of which it gives."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in body.graph.nodes:
        if node is begin or (begin is None and node.op == "placeholder"):
            copies[node] = graph.placeholder(node.name)
        elif node.op not in ("placeholder", "output") and all(n in copies for n in node.all_input_nodes):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[end] for end in ends))
    part = fx.GraphModule(body, graph)
    part.graph.eliminate_dead_code()
    part.delete_all_unused_submodules()
    part.recompile()
    return part
