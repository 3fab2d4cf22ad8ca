"""Trained clients: what they are trained on, and that they learn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dlgbench.case import Case
from dlgbench.datasets import Dataset
from dlgbench.grid import Data, why_not
from dlgbench.images import prepare
from dlgbench.networks import build
from dlgbench.registry import DATASETS, NETWORKS
from dlgbench.training import RATE, accuracy, train
from dlgbench.victims import network_of, trained_network_of
from tests.clients import case

DIGITS = DATASETS.make(DATASETS.spec("digits"), None)
SHAPE = (1, 1, 16, 16)


def client(**changes: object) -> Case:
    usual = {"dataset": "digits", "network": "lenet5:activation=relu", "channels": 1, "classes": 10}
    return case(**{**usual, "resolution": 16, "dtype": "float32", "epochs": 1, **changes})


@dataclass(frozen=True)
class Part:
    """Some images of a dataset, one of them black if so wished."""

    whole: Dataset
    length: int
    black: int = -1
    classes: int = 10
    channels: int = 1

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> Image.Image:
        return Image.new("L", (8, 8)) if index == self.black else self.whole.image(index)

    def label(self, index: int) -> int | None:
        return self.whole.label(index)


def weights(one: Case, dataset: Dataset) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in trained_network_of(one, dataset).parameters()])


def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    assert len(DIGITS) == len(labels) == 1797
    for index in (0, 100, 1796):
        found = prepare(DIGITS.image(index), 8, "fit", 1)[0]
        assert float((found.flatten() - torch.tensor(pixels[index] / 16)).abs().max()) < 0.5 / 255 + 1e-6
        assert DIGITS.label(index) == labels[index]


def test_the_first_step_is_adams() -> None:
    network = build(NETWORKS.spec("lenet5"), SHAPE, 10, 0, torch.float64)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(8, *SHAPE[1:], generator=generator, dtype=torch.float64), torch.arange(8)
    before = [weight.clone().requires_grad_() for weight in network.parameters()]
    names = [name for name, _ in network.named_parameters()]
    outputs = torch.func.functional_call(network, dict(zip(names, before, strict=True)), (images,))
    gradients = torch.autograd.grad(F.cross_entropy(outputs[0], labels), before)
    train(network, images, labels, 1, generator)
    for old, new, gradient in zip(before, network.parameters(), gradients, strict=True):
        step = RATE * gradient / (gradient.abs() + 1e-8)  # Kingma and Ba 2015, algorithm 1 at t = 1
        torch.testing.assert_close(new, (old - step).detach(), rtol=0, atol=1e-9)
        assert not new.requires_grad


@pytest.mark.parametrize("name", ["lenet5", "lenet_dlg"])
def test_it_learns_digits_it_has_not_seen(name: str) -> None:
    one = client(network=f"{name}:activation=relu", resolution=32, epochs=6, batch=300, image=0)
    shown = torch.stack([prepare(DIGITS.image(i), 32, "fit", 1) for i in range(300)])
    labels = torch.tensor([DIGITS.label(i) for i in range(300)])
    assert accuracy(network_of(one), shown, labels) < 0.3
    assert accuracy(trained_network_of(one, DIGITS), shown, labels) > 0.85


def test_all_images_but_the_private_ones_are_trained_on() -> None:
    one = client(batch=2, image=1)
    usual = weights(one, Part(DIGITS, 40))
    for index in range(6):
        same = torch.equal(weights(one, Part(DIGITS, 40, black=index)), usual)
        assert same == (index in (2, 3))


def test_training_depends_on_the_seed_alone() -> None:
    some = Part(DIGITS, 64)
    assert torch.equal(weights(client(), some), weights(client(attack="spectral", steps=9), some))
    assert not torch.equal(weights(client(), some), weights(client(seed=1), some))


def test_without_epochs_all_is_as_it_was() -> None:
    one = client(epochs=0)
    plain = torch.cat([weight.flatten() for weight in network_of(one).parameters()])
    assert torch.equal(weights(one, DIGITS), plain)
    without = {key: value for key, value in one.plain().items() if key != "epochs"}
    assert Case.from_plain(without) == one
    assert Case.from_plain(client().plain()) == client()
    assert client(epochs=1).id != one.id


def test_only_labelled_data_can_be_trained_on() -> None:
    assert "no classes" in str(why_not(client(dataset="photos", channels=3), Data(None)))
    assert "no images but" in str(why_not(client(batch=1797), Data(None)))
    assert why_not(client(), Data(None)) is None
    assert why_not(replace(client(dataset="photos", channels=3), epochs=0), Data(None)) is None
