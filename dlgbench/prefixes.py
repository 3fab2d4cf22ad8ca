"""Concatenations that grow: all that is in one is in the next, and needs to be in memory but once."""

from __future__ import annotations

import torch
from torch import fx

CAT, SLICE = torch.ops.aten.cat.default, torch.ops.aten.slice.Tensor
CHEAP = (
    torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, torch.ops.aten.mul.Tensor,
    torch.ops.aten.alias.default,
)  # fmt: skip
"""Worked out anew faster than it is read from memory."""
Part = tuple[fx.Node, int, int, int]
"""The arguments of a slice: the whole, the dimension, the first channel and the one behind the last."""


def prefixed(graph: fx.Graph) -> None:
    """Read all that is in a concatenation from the longest that starts with it, once that is there.

    In what gradients need of a DenseNet's block, each of its layers would keep a copy of all before it.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node, part in _parts(graph).items():
        _reread(graph, node, part, place)
    graph.eliminate_dead_code()


def _parts(graph: fx.Graph) -> dict[fx.Node, Part]:
    """Where else to find every concatenation that another starts with, and all that is concatenated."""
    longer = {node.args[0][0]: node for node in graph.nodes if node.target is CAT and node.args[1:] == (1,)}
    grown = {node for first, node in longer.items() if node in longer or first in longer.values()}
    parts: dict[fx.Node, Part] = {}
    for node in (node for node in longer.values() if node in grown):
        whole, start = node, 0
        while whole in longer:
            whole = longer[whole]
        for part in node.args[0]:
            start, before = start + part.meta["val"].shape[1], start
            parts.setdefault(part, (whole, 1, before, start))
        if whole is not node:
            parts[node] = (whole, 1, 0, start)
    return parts


def _reread(graph: fx.Graph, node: fx.Node, part: Part, place: dict[fx.Node, int]) -> None:
    whole = part[0]
    with graph.inserting_before(whole.next):
        again = {node: graph.call_function(SLICE, part)}
        for one in _until(place[whole], node, place):
            again[one] = graph.node_copy(one, lambda other: again.get(other, other))
    for one, copy in again.items():
        for user in list(one.users):
            if place.get(user, 0) > place[whole]:
                user.replace_input_with(one, copy)


def _until(end: int, node: fx.Node, place: dict[fx.Node, int]) -> list[fx.Node]:
    """All that is made of ``node`` cheaply before the place ``end``, in order."""
    found = [node]
    for one in found:
        found += [u for u in one.users if u.target in CHEAP and place.get(u, end) < end and u not in found]
    return sorted(found[1:], key=lambda one: place[one])
