"""Concatenations that grow: the same values, and nothing but the longest is read once it is there."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dlgbench.prefixes import CAT, prefixed

SHAPES = ((1, 2, 3, 3), (1, 1, 3, 3), (1, 3, 3, 3))


def grown(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """What a gradient does: all the way up, then of all that is there, the last first."""
    second = second * 2
    short = torch.cat((first, second), 1)
    cheap = short * 3 + 1
    dear = cheap.exp()
    long = torch.cat((short, third * dear.sum()), 1)
    return long.sum() + (cheap * short).sum() + dear.sum() * (second * first.square().sum()).sum()


def traced() -> fx.GraphModule:
    return make_fx(grown)(*map(torch.zeros, SHAPES))


def test_values_stay_the_same() -> None:
    graph, generator = traced(), torch.Generator().manual_seed(0)
    prefixed(graph.graph)
    graph.graph.lint()
    graph.recompile()
    parts = [torch.randn(shape, generator=generator) for shape in SHAPES]
    torch.testing.assert_close(graph(*parts), grown(*parts))


def test_what_is_in_the_longest_is_read_there() -> None:
    graph = traced().graph
    before = read_late(graph)
    prefixed(graph)
    assert before == {"short", "cheap", "first", "second", "dear"}
    assert read_late(graph) == {"dear"}


def read_late(graph: fx.Graph) -> set[str]:
    """What of all that is worked out before the longest concatenation is there is read after it."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    short, long = (node for node in graph.nodes if node.target is CAT)
    tripled = next(node for node in short.users if 3 in node.args)
    (cheap,) = tripled.users
    names = {short: "short", cheap: "cheap"} | dict(zip(short.args[0], ("first", "second"), strict=True))
    names |= {node: "dear" for node in cheap.users if node.target is torch.ops.aten.exp.default}
    return {name for node, name in names.items() if any(place[user] > place[long] for user in node.users)}


def test_concatenations_that_do_not_grow_are_left_alone() -> None:
    def function(first: Tensor, second: Tensor) -> Tensor:
        whole = torch.cat((first, second), 1)
        return whole.sum() + (first * second.sum()).sum()

    graph = make_fx(function)(*map(torch.zeros, SHAPES[:2])).graph
    before = str(graph)
    prefixed(graph)
    assert str(graph) == before
