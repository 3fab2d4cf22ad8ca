"""A traced graph in regions, each compiled by itself, so that memory is free as soon as it can be.

What a second derivative needs of the first lies in memory from then on.  Of a graph compiled as a whole,
inductor lets that pile up: it moves every sum to where it is used, and all that is summed waits for it.
Between regions nothing moves; and what a region needs of those before, it works out anew where that
takes but elementwise operations on what is in memory anyway (as Chen et al. 2016, "Training deep nets
with sublinear memory cost", do with all that is not a product).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from operator import getitem
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch._inductor.package import package_aoti
from torch._ops import OpOverload
from torch.export.pt2_archive._package import load_pt2

LENGTH = 3000
"""Operations of a region, at most: the shorter regions are, the less inductor can fuse."""
SMALL = 2**14
"""Tensors of fewer elements are kept rather than worked out anew: it takes a call of its own."""
STEPS = 16
"""So many operations in a row, at most, to work something out anew."""
Run = Callable[[list[Tensor]], Sequence[Tensor]]


class Region(NamedTuple):
    """What it takes, what of that nobody takes after it, and what it gives: values by their numbers."""

    takes: list[int]
    frees: list[int]
    gives: list[int]


class Regions:
    """The compiled code of `save`: it takes all arguments of the graph and returns its results."""

    def __init__(self, path: Path) -> None:
        runners = load_pt2(str(path)).aoti_runners
        loaders = [runners[str(number)].loader for number in range(len(runners))]
        plan, self.results = json.loads(loaders[0].get_metadata()["plan"])
        self.parts: list[tuple[Region, Run]] = [
            (Region(*region), loader.boxed_run) for region, loader in zip(plan, loaders, strict=True)
        ]  # not the runners' own call: it reads the signature anew each time, a sixth of a LeNet's

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        held = dict(enumerate(arguments))
        for region, run in self.parts:
            values = [held[i] for i in region.takes]
            for i in region.frees:
                del held[i]
            held.update(zip(region.gives, run(values), strict=True))
        return [held[i] for i in self.results]


@torch.no_grad()
def save(graph: fx.GraphModule, arguments: Sequence[Tensor], path: Path, threads: int) -> None:
    """Compile for tensors such as these, of the same strides, into the file ``path``."""
    parts, plan, results = cut(graph)
    options = {
        "cpp.threads": threads, "aot_inductor.package": True,
        "aot_inductor.metadata": {"plan": json.dumps([plan, results])},
    }  # fmt: skip
    files, held = {}, dict(enumerate(arguments))
    for number, (part, region) in enumerate(zip(parts, plan, strict=True)):
        values = tuple(held[i] for i in region.takes)
        held.update(zip(region.gives, part(*values), strict=True))
        module = torch.export.export(part, values).module(check_guards=False)
        files[str(number)] = torch._inductor.aot_compile(module, values, options=options)
    package_aoti(str(path), files)


def cut(graph: fx.GraphModule) -> tuple[list[fx.GraphModule], list[Region], list[int]]:
    """The regions' graphs and plan, and the numbers of the results."""
    numbers = {node: number for number, node in enumerate(graph.graph.nodes)}
    region = _regions(graph.graph)
    last = _last(region)
    parts = [_Part(number, region, last) for number in range(max(region.values()))]
    results = next(reversed(region)).all_input_nodes
    until = {node: part.number for part in parts for node in part.takes} | dict.fromkeys(results, len(parts))
    plan = []
    for part in parts:
        gives = [node for node, here in region.items() if here == part.number < until.get(node, -1)]
        frees = [node for node in part.takes if until[node] == part.number and region[node] >= 0]
        part.graph.output(tuple(part.copies[node] for node in gives))
        plan.append(Region(*([numbers[node] for node in some] for some in (part.takes, frees, gives))))
    return [fx.GraphModule(graph, part.graph) for part in parts], plan, [numbers[node] for node in results]


def _regions(graph: fx.Graph) -> dict[fx.Node, int]:
    """The region of every node: -1 of arguments, and of the output how many there are."""
    inner = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    count = -(-len(inner) // LENGTH)
    region = {node: -1 for node in graph.nodes if node.op == "placeholder"}
    for place, node in enumerate(inner):  # what several values come in does not leave its region
        region[node] = region[node.args[0]] if node.target is getitem else place * count // len(inner)
    return region | {node: count for node in graph.nodes if node.op == "output"}


def _last(region: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """The last region in which every node, or what lies in its memory, is used; arguments always are."""
    last: dict[fx.Node, int] = {}
    for node in reversed(region):
        uses = [last[user] if _is_view(user) else region[user] for user in node.users]
        last[node] = max(uses, default=region[node]) if region[node] >= 0 else len(region)
    return last


class _Part:
    """The graph of one region, and what it takes of others."""

    def __init__(self, number: int, region: dict[fx.Node, int], last: dict[fx.Node, int]) -> None:
        self.number, self.graph = number, fx.Graph()
        self.takes: list[fx.Node] = []
        self.copies: dict[fx.Node, fx.Node] = {}
        self.steps = _steps([node for node, here in region.items() if here < number], number, last)
        for node, here in region.items():
            if here == number:
                self.copies[node] = self.graph.node_copy(node, self._copy)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self.copies and node in self.steps:
            self.copies[node] = self.graph.node_copy(node, self._copy)
        elif node not in self.copies:
            self.takes.insert(0, node)
            with self.graph.inserting_before():  # all else
                self.copies[node] = self.graph.placeholder(node.name)
        return self.copies[node]


def _steps(nodes: Sequence[fx.Node], number: int, last: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """In how many steps region ``number`` works out anew what it can of the ``nodes`` before it."""
    steps: dict[fx.Node, int] = {}
    for node in nodes:
        parts = node.all_input_nodes
        there = all(part in steps or last[part] >= number or _is_small(part) for part in parts)
        count = 1 + max((steps.get(part, 0) for part in parts), default=0)
        if _is_view(node) or (_is_elementwise(node) and not _is_small(node) and there and count <= STEPS):
            steps[node] = count
    return steps


def _is_small(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.numel() < SMALL


def _is_elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_view(node: fx.Node) -> bool:
    """Whether it lies in the memory of what it is made of."""
    if node.target is getitem:
        return _is_view(node.all_input_nodes[0])
    return node.op == "get_attr" or (isinstance(node.target, OpOverload) and node.target.is_view)
