"""Networks made smooth for the attacker: where a unit dies or a maximum changes hands, gradients jump."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dlgbench.bilinear import linear
from dlgbench.prepare import Network
from dlgbench.window import Window

RELU = 200.0
"""The sharpness of `soft_relu`.  Measured on lenet5 and lenet_dlg: 30 blurs the images, 300 is nearly as hard
to descend as ReLU."""
POOL = 8.0
"""The sharpness of `soft_max_pool`.  Measured on resnet18: docs/tried.md."""
SHARPNESS = "body.sharpness"
"""The buffer that `adjustable` reads it from instead."""
TINY = 1e-12
"""Keeps the root's derivatives finite where all features are alike."""
FAR = 100.0
"""How many widths below all features what pads a maximum is: its weight is exp(-100) at most."""


def soft_relu(features: Tensor, sharpness: float) -> Tensor:
    """Softplus, whose bend is as wide as the features' root mean square over the ``sharpness``."""
    width = (features.square().mean() + TINY).sqrt() / sharpness
    return F.softplus(features / width) * width


def soft_max_pool(
    features: Tensor, kernel_size: int, stride: int, padding: int = 0, sharpness: float | Tensor = POOL
) -> Tensor:
    """The mean of every window, weighted by softmax in units of the features' deviation over ``sharpness``.

    ``features`` are ``(image, channel, height, width)``.
    """
    width = (features.var(correction=0) + TINY).sqrt() / sharpness
    lowest = (features.amin() - FAR * width).detach()
    window = Window.of((kernel_size,) * 2, stride, (padding,) * 2, (features.shape[2], features.shape[3]))
    seen = linear((features - lowest).permute(0, 2, 3, 1), partial(_seen, window), partial(_of_seen, window))
    return ((seen * (seen / width).softmax(0)).sum(0) + lowest).permute(0, 3, 1, 2)


def level_max_pool(
    features: Tensor, kernel_size: int, stride: int, padding: int = 0, sharpness: float = POOL
) -> Tensor:
    """`soft_max_pool`, of every image and channel raised by what it is lower than the maximum on average.

    Else all above it is smaller than in the network that is imitated, which takes the image for pale.
    """
    soft = soft_max_pool(features, kernel_size, stride, padding, sharpness)
    return soft + (F.max_pool2d(features, kernel_size, stride, padding) - soft).mean((2, 3), keepdim=True)


# what a window sees, and the transpose of that: inductor's own for a window takes five times as long


def _seen(window: Window, images: Tensor) -> Tensor:
    """``(image, height, width, channel)`` → ``(kernel kernel, image, row, column, channel)``"""
    return window.views(images).flatten(0, 1)


def _of_seen(window: Window, seen: Tensor) -> Tensor:
    grid = seen.reshape(*window.kernel, *seen.shape[1:])
    return window.sums([row.unbind() for row in grid])


def softened(network: Network) -> Network:
    """``network`` with every ReLU and maximum made smooth; it shares all weights and buffers."""
    assert isinstance(network.body, fx.GraphModule)
    soft = copy.copy(network)
    soft._modules = {**network._modules, "body": bent(network.body, RELU)}
    return soft


def adjustable(network: Network) -> Network:
    """As `softened`, but its maxima, where it has any, are as sharp as the buffer `SHARPNESS` says."""
    soft = softened(network)
    assert isinstance(soft.body, fx.GraphModule)
    maxima = soft.body.graph.find_nodes(op="call_function", target=soft_max_pool)
    if maxima:
        soft.body.register_buffer("sharpness", torch.full_like(network.mean[0, 0, 0], POOL))
    for node in maxima:
        with soft.body.graph.inserting_before(node):
            node.update_kwarg("sharpness", soft.body.graph.get_attr("sharpness"))
    soft.body.recompile()
    return soft


def bent(
    body: fx.GraphModule, relu: float, pool: float = POOL, maximum: Callable[..., Tensor] = soft_max_pool
) -> fx.GraphModule:
    """``body`` with every ReLU and every ``maximum`` made smooth, of these sharpnesses."""
    soften = _Soften(body)
    soften.relu, soften.pool, soften.maximum = relu, pool, maximum
    return soften.transform()


class _Soften(fx.Transformer):
    """Bound to sharpnesses and a maximum by `bent`."""

    relu: float
    pool: float
    maximum: Callable[..., Tensor]

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.submodules[target]
        if isinstance(layer, nn.MaxPool2d):
            sizes = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding")}
            return self.call_function(F.max_pool2d, args, sizes)
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is F.relu:
            return super().call_function(soft_relu, args[:1], {"sharpness": self.relu})
        if target is F.max_pool2d:
            sizes = {k: v for k, v in kwargs.items() if k in ("kernel_size", "stride", "padding")}
            return super().call_function(self.maximum, args, sizes | {"sharpness": self.pool})
        return super().call_function(target, args, kwargs)
