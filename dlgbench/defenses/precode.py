"""A network with noise before its head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlgbench.defenses.base import Client, Defense, Tensors, finite
from dlgbench.errors import Unsuitable, UsageError
from dlgbench.prepare import Network, probe
from dlgbench.registry import DEFENSES
from dlgbench.stochastic import Bottleneck


@DEFENSES.register("precode", rebuilds=True, positive=("units",))
@dataclass(frozen=True)
class Precode(Defense):
    """The network's head is put behind a variational bottleneck, whose noise is drawn anew at every update.

    Scheliga, Maeder, Seeland 2022, "PRECODE: A Generic Model Extension to Prevent Deep Gradient Leakage",
    with their 256 units.  Its loss has the divergence of the code.
    """

    units: int = 256

    def protect(self, network: Network, shape: tuple[int, ...]) -> Network:
        name = network.head
        head = network.get_submodule(name)
        if len(network.heads) > 1 or not isinstance(head, nn.Linear):
            raise Unsuitable("precode needs a network with one head")
        network.set_submodule(name, Bottleneck(head, self.units))
        del network.head  # it is kept, once asked for
        probe(network, shape)
        return network

    def update(self, client: Client, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensors:
        """Of a network that `protect` has changed; the noise is the client's, from `Network.draw_masks`."""
        if f"{_bottleneck(client)}.encoder.bias" not in client.weights:
            raise UsageError(
                "precode: expected a network with a bottleneck, got one without; call `protect` first"
            )
        return finite(client.gradient(images, labels))

    def expected(self, client: Client, images: Tensor, labels: Tensor, shared: Tensors) -> Tensors:
        """Of one image, up to the bottleneck: the loss's gradient there is that of the encoder's bias.

        What lies behind it, with the noise, need not be known, nor the label.
        """
        if len(images) > 1:
            return client.gradient(images, labels)
        bottleneck = _bottleneck(client)
        slope = shared[f"{bottleneck}.encoder.bias"]

        def linear(weights: Tensors) -> Tensor:
            return (client.outputs(images, weights)[-1] * slope).sum()

        ours: Tensors = torch.func.grad(linear)(client.weights)
        behind = tuple(f"{bottleneck}.{part}." for part in ("decoder", "head"))
        return {name: shared[name] if name.startswith(behind) else g for name, g in ours.items()}


def _bottleneck(client: Client) -> str:
    return client.head.removesuffix(".head")
