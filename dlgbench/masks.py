"""Dropout before the head, read off the head's gradient: a mask that is drawn is not thereby secret."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx, nn

from dlgbench.leak import Leak, Tensors
from dlgbench.prepare import Network
from dlgbench.stochastic import Dropout


def read(network: Network, leak: Leak, labels: Tensor) -> Tensors:
    """One case's masks ``(image, …)``, by their buffers' names, of images with ``labels`` ``(image,)``.

    In the row of an image's label in the head's weight gradient its own features count with p - 1, those of
    all others with their p: where features are not negative, it is negative where its own were kept, unless
    another image, of another label, is taken for this one.  Empty, where no dropout is right before the head,
    where two images share their label, and where rows of absent classes are negative or none is: then
    features are, or the gradient is not as it was.
    """
    name = _dropout_before(network)
    if name is None or len({*labels.tolist()}) < len(labels):
        return {}
    layer = network.get_submodule(name)
    assert isinstance(layer, Dropout)
    assert layer.shape is not None
    rows = leak.gradients[f"{network.head}.weight"]
    kept, absent = rows[labels] < 0, torch.ones_like(rows[:, 0]).index_fill(0, labels, 0).bool()
    if (rows[absent] < 0).any() or not kept.any():
        return {}
    mask = kept.to(network.mean) / (1 - layer.p)
    return {f"{name}.mask": mask.view(len(labels), *layer.shape[1:])}


def in_order(network: Network, leak: Leak, labels: Tensor) -> Tensor:
    """One case's ``labels`` ``(image,)`` in the order of the masks that the attacker is given.

    Each of those belongs to one image, and a label that was counted to none: the mask that is read with it
    tells to which.  As they are, where no masks are given or none can be read.
    """
    for name, mask in read(network, leak, labels).items():
        if name in leak.buffers:
            apart = torch.cdist(leak.buffers[name].flatten(1), mask.flatten(1))
            return labels[linear_sum_assignment(apart.cpu().numpy())[1]]
    return labels


def _dropout_before(network: Network) -> str | None:
    """The name of the dropout layer whose output the head takes, flattened at most."""
    assert isinstance(network.body, fx.GraphModule)
    calls = {f"body.{node.target}": node for node in network.body.graph.nodes if node.op == "call_module"}
    node = calls.get(network.head)
    while node is not None and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        module = network.body.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Dropout):
            return f"body.{node.target}"
        if not isinstance(module, nn.Flatten | nn.Identity) and node.target is not torch.flatten:
            return None
    return None
