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

Part = Callable[[tuple[Tensor]], Sequence[Tensor]]
"""What a softened network computes of an image."""


def invert(network: Network, leak: Leak, values: Mapping[fx.Node, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Images ``shape``, in [0, 1] or near, on which nodes of the network's body have these ``values``.

    Each on its own, by L-BFGS from grey while maxima sharpen, with the weights and buffers of one case's
    ``leak``.  The network must not mix them: no statistics of the batch.
    """
    assert isinstance(network.body, fx.GraphModule)
    ends = frontier(network.body, values)
    part, shared = trunk(network.body, ends), leak.weights | leak.buffers
    state = {name: shared[f"body.{name}"] for name in part.state_dict()}
    levels = torch.logspace(math.log10(SOFTEST), math.log10(SHARPEST), LEVELS).tolist()
    parts = [partial(functional_call, bent(part, RELU, level, level_max_pool), state) for level in levels]
    each = zip(*(values[end].to(network.mean).unsqueeze(1) for end in ends), strict=True)
    return torch.cat([_image(network, parts, wanted, shape[1:]) for wanted in each])


def _image(network: Network, parts: Sequence[Part], wanted: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The image ``(1, *shape)`` on which the last of the parts gives what is ``wanted``.

    Each is begun where the one before ended.  The unknowns are coefficients times the root of photos'
    amplitudes: coefficients as well as pixels are worse scaled.
    """
    spectrum, sizes = Spectrum(shape, network.mean, FALL), [value.square().sum() for value in wanted]
    root = spectrum.amplitude.sqrt()
    unknown = torch.zeros((1, *shape)).to(network.mean).requires_grad_()

    def image() -> Tensor:
        return 0.5 + CONTRAST * spectrum.usual * spectrum.images(unknown / root)

    def objective(part: Part) -> Tensor:
        found = part((network.normalise(image()),))
        misfits = [(a - b).square().sum() / size for a, b, size in zip(found, wanted, sizes, strict=True)]
        return torch.stack(misfits).sum() + PRIOR * (unknown / root).square().mean()

    for part in parts:
        descend(partial(objective, part), unknown, iterations=ITERATIONS, history=HISTORY)
    return image().detach()


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
