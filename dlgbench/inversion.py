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
from dlgbench.softening import RELU, bent
from dlgbench.spectrum import CONTRAST, Spectrum

SOFTEST, SHARPEST, LEVELS = 0.5, 16.0, 8
"""The sharpness of maxima, from level to level by the same factor.  Which of nine positions is the largest is
what a descent cannot revise; measured, as all here, on resnet18 at 224 px: docs/attacks.md."""
PRIOR, FALL = 0.4, 1.0
"""The weight of how large coefficients are for photos, in units of the sharpness' inverse square, which is
about what the softened network misses at the truth; and how fast those of photos fall with frequency."""
ITERATIONS, HISTORY = 100, 50
"""Of L-BFGS on each level, for every image: several tell less of each."""


def invert(network: Network, leak: Leak, values: Mapping[fx.Node, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Images ``shape``, in [0, 1] or near, on which nodes of the network's body have these ``values``.

    By L-BFGS from grey, with the weights and buffers of one case's ``leak``, while maxima sharpen and a
    prior fades with what their softness leaves (as `continuation` does with ReLU).
    """
    assert isinstance(network.body, fx.GraphModule)
    ends = frontier(network.body, values)
    part, wanted = trunk(network.body, ends), [values[end].to(network.mean) for end in ends]
    sizes = [value.square().sum() for value in wanted]
    shared = leak.weights | leak.buffers
    state = {name: shared[f"body.{name}"] for name in part.state_dict()}
    spectrum, photos = (Spectrum(shape[-3:], network.mean, *fall) for fall in ((), (FALL,)))
    relative = spectrum.usual * spectrum.amplitude / (photos.usual * photos.amplitude)
    unknown, iterations = torch.zeros(shape).to(network.mean).requires_grad_(), ITERATIONS * shape[0]

    def images() -> Tensor:
        return 0.5 + CONTRAST * spectrum.usual * spectrum.images(unknown)

    def objective(soft: fx.GraphModule, prior: float) -> Tensor:
        found = functional_call(soft, state, (network.normalise(images()),))
        misfits = [(a - b).square().sum() / size for a, b, size in zip(found, wanted, sizes, strict=True)]
        return torch.stack(misfits).sum() + prior * (relative * unknown).square().mean()

    for sharpness in torch.logspace(math.log10(SOFTEST), math.log10(SHARPEST), LEVELS).tolist():
        soft = bent(part, RELU, sharpness)
        descend(
            partial(objective, soft, PRIOR / sharpness**2), unknown,
            iterations=iterations, closures=2 * iterations, history=HISTORY,
        )  # fmt: skip
    return images().detach()


def descend(
    objective: Callable[[], Tensor], unknown: Tensor, *, iterations: int, closures: int, history: int
) -> None:
    """Move the leaf ``unknown`` to where an objective of it is low, by L-BFGS to the end of its means."""
    optimizer = torch.optim.LBFGS(
        [unknown], max_iter=iterations, max_eval=closures, history_size=history,
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
