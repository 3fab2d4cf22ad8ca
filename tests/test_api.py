"""The attacks on models and gradients of one's own, taken by plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlgbench import api
from dlgbench.errors import UsageError
from dlgbench.images import prepare
from dlgbench.leak import gradients
from dlgbench.networks import adapted

from .clients import PHOTOS

MEAN, STD = (0.5, 0.375, 0.25), (0.25, 0.5, 0.25)  # which single precision holds


def photos(count: int, side: int) -> Tensor:
    return torch.stack([prepare(PHOTOS.image(index), side, "fit", 3) for index in range(count)]).double()


def taken(model: nn.Module, images: Tensor, labels: Sequence[int]) -> list[Tensor]:
    """A gradient as a user would take it."""
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    loss = F.cross_entropy(model(normalised.to(next(model.parameters()))), torch.tensor(labels))
    return list(torch.autograd.grad(loss, list(model.parameters())))


def seeded(*layers: nn.Module) -> nn.Sequential:
    generator, model = torch.Generator().manual_seed(0), nn.Sequential(*layers).double()
    for weight in model.parameters():
        weight.data = torch.rand(weight.shape, generator=generator).double() - 0.5
    return model


def convolutional(activation: type[nn.Module]) -> nn.Sequential:
    return seeded(
        nn.Conv2d(3, 12, 5, stride=2, padding=2), activation(), nn.Conv2d(12, 12, 5, stride=2, padding=2),
        activation(), nn.Flatten(), nn.Linear(768, 10),
    )  # fmt: skip


@pytest.mark.parametrize(("activation", "least"), [(nn.Sigmoid, 40), (nn.Tanh, 40), (nn.ReLU, 20)])
def test_a_photo_is_found_in_ones_own_gradient(activation: type[nn.Module], least: float) -> None:
    model, private = convolutional(activation), photos(1, 32)
    before = [weight.clone() for weight in model.parameters()]
    gradient = taken(model, private, [7])
    found = api.reconstruct(model, gradient, (1, 3, 32, 32), mean=MEAN, std=STD, steps=5)
    (row,) = found.compared(private)
    assert float(row["psnr"]) > least
    assert row["outcome"] == ("exact" if least == 40 else "recognisable")
    assert found.labels.argmax(1).tolist() == [7]
    assert (found.relative < 1e-4) is (least == 40)
    assert all(map(torch.equal, before, model.parameters()))
    named = dict(zip(dict(model.named_parameters()), gradient, strict=True))
    again = api.reconstruct(model, named, (1, 3, 32, 32), mean=MEAN, std=STD, steps=5)
    assert torch.equal(again.images, found.images)


@pytest.mark.parametrize("training", [True, False])
def test_the_modes_of_ones_own_model_are_kept(training: bool) -> None:
    """The private batch has no distance, with batch norm in either mode."""
    model = seeded(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.0 if training else 0.5), nn.Flatten(), nn.Linear(196, 5),
    ).train(training)  # fmt: skip
    for buffer in model.buffers():  # statistics that single precision does not hold
        buffer.data = torch.linspace(0.5, 1.1, buffer.numel(), dtype=torch.float64).to(buffer).view_as(buffer)
    private = photos(2, 16)
    gradient = taken(model, private, [1, 4])
    network = adapted(model, (2, 3, 16, 16), MEAN, STD).double()
    leak = api._leak(model, gradient, network, 2).row(0)
    masks = network.draw_masks(2, torch.Generator())
    labels = F.one_hot(torch.tensor([1, 4]), 5).double()
    ours = gradients(network, leak.weights, {**leak.buffers, **masks}, private, labels)
    for name, theirs in leak.gradients.items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-10, atol=1e-14)


def test_a_mixed_up_batch_is_compared_image_by_image() -> None:
    private = photos(3, 32)
    found = api.Found(private[[2, 0, 1]], torch.eye(3), 0.0)
    assert [row["outcome"] for row in found.compared(private)] == ["exact"] * 3
    grey = api.Found(torch.full_like(private, 0.5), torch.eye(3), 0.0)
    assert {row["outcome"] for row in grey.compared(private)} == {"failed"}


def test_what_does_not_fit_is_told() -> None:
    model = convolutional(nn.Sigmoid)
    gradient = taken(model, photos(1, 32), [7])
    shape = (1, 3, 32, 32)
    with pytest.raises(UsageError, match="each of 6 parameters, got 5"):
        api.reconstruct(model, gradient[:5], shape)
    with pytest.raises(UsageError, match=r"gradient of 0.weight: expected the shape \(12, 3, 5, 5\)"):
        api.reconstruct(model, gradient[::-1], shape)
    with pytest.raises(UsageError, match=r"expected the shape \(12, 3, 5, 5\), got None"):
        api.reconstruct(model, [weight.grad for weight in model.parameters()], shape)  # type: ignore[misc]
    with pytest.raises(UsageError, match=r"that torch\.fx traces"):
        api.reconstruct(model, gradient, (1, 1, 32, 32))
    with pytest.raises(UsageError, match="one that attacks"):
        api.reconstruct(model, gradient, shape, attack="none")
    with pytest.raises(UsageError, match="did you mean 'spectral'"):
        api.reconstruct(model, gradient, shape, attack="spectrall")
