"""The clients: a case → the leak that an attack trains on, and the secret that a judge holds.

This is no LightningDataModule: a Trainer hands its data module to the module it trains, and an
attack must not be able to reach the secret.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgbench import datasets, networks
from dlgbench.case import Case, stream
from dlgbench.datasets import Dataset
from dlgbench.leak import Client, Leak, Secret, Tensors, statistics
from dlgbench.prepare import Network
from dlgbench.registry import DEFENSES
from dlgbench.training import train

CPU = torch.device("cpu")


def network_of(case: Case) -> Network:
    """The case's network with the case's weights; raises `Unsuitable` with the reason to skip it."""
    dtype, protect = getattr(torch, case.dtype), DEFENSES.make(case.defense).protect
    return networks.build(case.network, case.shape, case.classes, stream(case, "weights"), dtype, protect)


def trained_network_of(case: Case, dataset: Dataset) -> Network:
    """The case's network after its epochs on all images of the dataset that are not private."""
    network = network_of(case)
    if not case.epochs:
        return network
    others = [i for i in range(len(dataset)) if i not in indices(case)]
    return train(network, *labelled(case, dataset, others), case.epochs, _generator(case, "training"))


def labelled(case: Case, dataset: Dataset, which: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some images of a dataset that has classes, as the case's network takes them, and their classes."""
    return _prepared(case, dataset, which), torch.tensor([dataset.label(i) for i in which])


def indices(case: Case) -> range:
    """Which images of the dataset the case takes: batch after batch."""
    return range(case.image * case.batch, (case.image + 1) * case.batch)


def secret_of(case: Case, dataset: Dataset) -> Secret:
    """The private batch of one case; images that carry no class get one drawn from the case's seed."""
    drawn = torch.randint(case.classes, (case.batch,), generator=_generator(case, "labels")).tolist()
    labels = [d if (k := dataset.label(i)) is None else k for i, d in zip(indices(case), drawn, strict=True)]
    return Secret(_prepared(case, dataset, indices(case))[None], torch.tensor(labels)[None])


def leak_of(case: Case, network: Network, secret: Secret, device: torch.device = CPU) -> Leak:
    """What the client of one case shares after one backward pass over its private batch, on ``device``."""
    weights = {name: tensor.detach() for name, tensor in network.named_parameters()}
    state = {name: tensor for name, tensor in network.named_buffers() if name.startswith("body.")}
    drawn = network.draw_masks(case.batch, _generator(case, "dropout"))
    masks = {name: mask.to(device) for name, mask in drawn.items()}
    images, labels = secret.images[0].to(device), F.one_hot(secret.labels[0], case.classes).to(network.mean)
    client, defense = Client(network, weights, {**state, **masks}), DEFENSES.make(case.defense)
    shared = defense.observed(client, images, labels, _generator(case, "defense"))
    state |= statistics(network, weights, client.buffers, images)
    declared = {name: tensor for name, tensor in state.items() if name not in masks}
    return Leak(*map(_one_case, (weights, {**declared, **(masks if network.mask_known else {})}, shared)))


def _prepared(case: Case, dataset: Dataset, which: Sequence[int]) -> Tensor:
    """Some images of the dataset as the case's network takes them."""
    images = (
        datasets.prepare(dataset.image(i), case.resolution, case.preparation, case.channels) for i in which
    )
    return torch.stack(list(images)).to(getattr(torch, case.dtype))


def _one_case(tensors: Tensors) -> Tensors:
    return {name: tensor[None] for name, tensor in tensors.items()}


def _generator(case: Case, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream(case, purpose))
