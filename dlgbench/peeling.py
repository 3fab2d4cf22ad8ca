"""Images in closed form: a network's layers are solved for from the head down, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

from torch import Tensor, fx, nn

from dlgbench import chains, continuation, inversion, newton, residual
from dlgbench.batchnorm import BatchNorm2d
from dlgbench.leak import Leak
from dlgbench.prepare import ACTIVATIONS, Network

ENOUGH = 0.5
"""Features that an image is sought from, as a share of its pixels: fewer show none."""


def peel(
    network: Network,
    leak: Leak,
    shape: tuple[int, ...],
    tell: Callable[[float], None] = lambda objective: None,
) -> Iterator[tuple[int, Tensor]]:
    """Which cases can be solved for, each with its images ``(image, channel, height, width)`` in [0, 1].

    ``shape`` is that of a case's images, which are in the order of their labels.  What lies below the
    lowest layer of a chain that can be inverted is solved for as a whole if the image is small enough, and
    alone.  Else the layers of a residual network are, and the images are those that they are computed on.
    Where ReLU leaves the equations underdetermined, images are filled smoothly.  Computed in float64; what
    the leak was rounded to is amplified from layer to layer; where it is too much, no more are solved.
    ``tell`` hears every objective of what takes long.
    """
    if f"{network.head}.bias" not in leak.gradients or _withheld(network):
        return
    layers = chains.chain(network, shape)
    below = _below(network, layers[0]) if layers else None
    small = shape[0] == 1 and (below is None or math.prod(shape) <= _solver(below).LARGEST)
    solve = partial(_peel, layers) if layers and small else partial(_descend, tell=tell)
    for case in range(len(leak.gradients[f"{network.head}.bias"])):
        images = solve(network, leak.row(case), shape)
        if images is not None and images.isfinite().all():
            yield case, images.to(network.mean).clamp(0, 1)


def _withheld(network: Network) -> bool:
    """Whether there are parameters of whose gradient nothing is shared: they are buffers."""
    return any(name.rpartition(".")[2] in ("weight", "bias") for name, _ in network.named_buffers())


def _descend(
    network: Network, leak: Leak, shape: tuple[int, ...], tell: Callable[[float], None]
) -> Tensor | None:
    """One case's images from what can be told of a residual network's layers; None where it is too little.

    Their labels are the classes whose logits the loss pulls up: the slope of the features is that of the
    logits, ``p - y``, times the head's weight.
    """
    assert isinstance(network.body, fx.GraphModule)
    layers = residual.Layers(network.body, _exactly(leak))
    told = sum(layers.values[node].numel() for node in inversion.frontier(network.body, layers.values))
    if told < ENOUGH * math.prod(shape):
        return None
    weight = leak.weights[f"{network.head}.weight"].double()
    if shape[0] > 1 and weight.shape[1] != layers.features.shape[1]:
        return None  # whose image is whose is not known where more than the head is above
    found = inversion.invert(network, leak, layers.values, shape, tell=tell)
    return found[(layers.features @ weight.T).argmin(1).argsort(stable=True)] if shape[0] > 1 else found


def _exactly(leak: Leak) -> Leak:
    """The same in float64."""
    return Leak(*({name: tensor.double() for name, tensor in part.items()} for part in leak))


def _peel(
    layers: Sequence[chains.Layer], network: Network, leak: Leak, shape: tuple[int, ...]
) -> Tensor | None:
    """One case's image, layer by layer, and as a whole what these leave; None where it is no gradient's."""
    leak = _exactly(leak)
    for found in chains.solve(layers, leak):
        if not found.value.isfinite().all():
            return None
    rest = _below(network, found.layer)
    if rest is None:
        inputs = found.value
    elif math.prod(shape) <= _solver(rest).LARGEST:
        names = {f"body.{name}": name for name, _ in rest.named_parameters()}
        weights, gradients = ({names[n]: part[n] for n in names} for part in (leak.weights, leak.gradients))
        inputs = _solver(rest).solve(newton.Segment(rest, weights, gradients, *found[1:]), shape)
    else:
        return None
    return inputs.view(shape) * network.std + network.mean


def _below(network: Network, layer: chains.Layer) -> fx.GraphModule | None:
    """What computes a layer's input from the image; None where it is the image."""
    assert isinstance(network.body, fx.GraphModule)
    bottom = layer.source.op == "placeholder"
    return None if bottom else inversion.trunk(network.body, [layer.source])


def _solver(trunk: fx.GraphModule) -> ModuleType:
    """By what an image is found below the chain.  What is normalised is too deep for a continuation."""
    rectified = any(node.target is ACTIVATIONS["relu"] for node in trunk.graph.nodes)
    normalised = any(isinstance(layer, nn.BatchNorm2d | BatchNorm2d) for layer in trunk.modules())
    return continuation if rectified and not normalised else newton
