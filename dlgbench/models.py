"""Classifiers of one's own as networks under attack."""

from __future__ import annotations

import copy
from collections.abc import Sequence, Set

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dlgbench.batchnorm import BatchNorm2d
from dlgbench.convolution import suited
from dlgbench.errors import UsageError
from dlgbench.networks import Shape
from dlgbench.prepare import Network, probe, replace_activation, swap
from dlgbench.stochastic import Dropout

ROUNDING = 1e-3
"""How far the logits of a network may be from its model's, in units of the largest."""
STATELESS: dict[str, bool | None] = {
    "track_running_stats": False, "running_mean": None, "running_var": None, "num_batches_tracked": None,
}  # fmt: skip
"""How a norm keeps nothing of earlier batches, which in train mode it does not use."""
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within `torch.compile`'s or one of `WRAPPERS`, which torch.fx does not trace."""
    inner = model.module if isinstance(model, WRAPPERS) else getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def adapted(
    model: nn.Module,
    shape: Shape,
    mean: Sequence[float],
    std: Sequence[float],
    heads: Sequence[float] = (1.0,),
) -> Network:
    """A copy of ``model`` as a network under attack, every layer in the mode that it is in.

    In train mode batch norm uses the batch's statistics, and dropout draws what the attacker does not know.
    ``mean`` and ``std`` normalise pixels in [0, 1] before it; ``heads`` are the weights of its heads' losses.
    Raises UsageError where it cannot be traced, does not take images of this ``shape``, does not end in as
    many linear layers, or computes something else than its trace.
    """
    own = copy.deepcopy(model).cpu().to(torch.promote_types(next(model.parameters()).dtype, torch.float32))
    try:
        network = Network(_body(copy.deepcopy(own)), mean, std, tuple(heads)).to(next(own.parameters()).dtype)
        probe(network, shape)
        last = [network.body.get_submodule(str(node.target)) for node in network.head_nodes]
    except Exception as error:  # of torch.fx, of the model's own
        raise UsageError(f"expected a classifier of images {shape} that torch.fx traces: {error}") from error
    if len(last) != len(heads):
        raise UsageError(f"expected the weights of {len(last)} heads' losses, `heads`, got {len(heads)}")
    if not all(isinstance(layer, nn.Linear) for layer in last):
        raise UsageError(f"expected a classifier whose last layer is nn.Linear, got {type(last[0]).__name__}")
    _check(network, own, shape)
    return network.requires_grad_(False)


def _body(model: nn.Module) -> nn.Module:
    body = replace_activation(model, "relu")
    for layer in body.modules():  # of whatever norm
        if getattr(layer, "track_running_stats", False) and layer.training:
            for name, value in STATELESS.items():
                setattr(layer, name, value)
    swap(body, nn.Dropout, lambda layer: Dropout(layer.p) if layer.training else nn.Identity())
    swap(body, nn.BatchNorm2d, _norm)
    swap(body, nn.Conv2d, suited)
    return body


def _norm(layer: nn.BatchNorm2d) -> nn.Module:
    return BatchNorm2d(layer) if layer.affine and layer.running_mean is None else layer


def withhold(network: Network, shared: Set[str]) -> None:
    """Make buffers of all parameters of the body but those that are ``shared``, of which there is a gradient.

    Raises UsageError where the head's weight, of which labels are read, is not among these.
    """
    head = f"{network.head.removeprefix('body.')}.weight"
    if head not in shared:
        raise UsageError(f"expected the gradient of the last layer's weight, {head}, got None")
    for parameter, value in list(network.body.named_parameters()):
        if parameter not in shared:
            path, _, name = parameter.rpartition(".")
            layer = network.body.get_submodule(path)
            delattr(layer, name)
            layer.register_buffer(name, value.detach())


def _check(network: Network, model: nn.Module, shape: Shape) -> None:
    """Raise UsageError where the network draws at random or computes something else than its model."""
    for layer in model.modules():
        if type(layer) is nn.Dropout:
            layer.p = 0.0
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(network.mean)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        ours = network(pixels)
        if not torch.equal(before, torch.get_rng_state()):
            raise UsageError(
                "expected a model that draws at random by nn.Dropout alone: F.dropout, stochastic depth and "
                "the like have to be replaced by it or switched off, as in eval mode"
            )
        theirs = model(network.normalise(pixels))
    theirs = (theirs,) if isinstance(theirs, Tensor) else theirs
    if any((a - b).abs().max() > ROUNDING * b.abs().max() for a, b in zip(ours, theirs, strict=True)):
        raise UsageError("expected a model that computes what torch.fx traces of it; it may keep a state")
