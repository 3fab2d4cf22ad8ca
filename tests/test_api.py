"""The attacks on models and gradients of one's own, taken by plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dlgbench import api
from dlgbench.errors import UsageError
from dlgbench.images import prepare

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


@pytest.mark.parametrize("by", [0.01, 32.0])
@pytest.mark.parametrize(("activation", "least"), [(nn.Sigmoid, 40), (nn.ReLU, 20)])
def test_a_photo_is_found_in_a_multiple_of_ones_gradient(
    activation: type[nn.Module], least: float, by: float
) -> None:
    """Clipped, of a loss that was summed or scaled, or the step that it made."""
    model, private = convolutional(activation), photos(1, 32)
    gradient = [by * g for g in taken(model, private, [7])]
    found = api.reconstruct(model, gradient, (1, 3, 32, 32), mean=MEAN, std=STD, steps=5)
    assert float(found.compared(private)[0]["psnr"]) > least


@pytest.mark.parametrize("named", [False, True])
def test_a_photo_is_found_though_no_gradient_of_a_layer_is_shared(named: bool) -> None:
    """As of a frozen layer: what the others tell is enough here (measured: 32.7 dB)."""
    model, private = convolutional(nn.Sigmoid), photos(1, 32)
    whole = zip(dict(model.named_parameters()), taken(model, private, [7]), strict=True)
    gradient = {name: None if name.startswith("0.") else tensor for name, tensor in whole}
    some = {name: tensor for name, tensor in gradient.items() if tensor is not None}
    given = some if named else list(gradient.values())
    found = api.reconstruct(model, given, (1, 3, 32, 32), mean=MEAN, std=STD, steps=20)
    (row,) = found.compared(private)
    assert float(row["psnr"]) > 25
    assert found.labels.argmax(1).tolist() == [7]


@pytest.mark.parametrize("count", [1, 2])
def test_layers_between_the_convolutions_and_the_head_do_no_harm(count: int) -> None:
    """As in VGG with batch norm: the topmost convolution of one image is read off all the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 72, 5, stride=4, padding=2), nn.BatchNorm2d(72), nn.ReLU(),
            nn.Conv2d(72, 72, 3, padding=1), nn.BatchNorm2d(72), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(72 * 9, 32), nn.ReLU(), nn.Linear(32, 5),
        ).double().eval()  # fmt: skip
    private = photos(count, 24)
    gradient = taken(model, private, range(count))
    found = api.reconstruct(model, gradient, (count, 3, 24, 24), mean=MEAN, std=STD, steps=1)
    assert found.labels.argmax(1).tolist() == list(range(count))
    if count == 1:  # whose images are whose is told where the head alone is above
        assert found.compared(private)[0]["outcome"] == "recognisable"  # measured: 23.5 dB


class Spare(nn.Module):
    """A head that is not used in eval mode, as in GoogLeNet and Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.head = nn.Linear(768, 5), nn.Linear(768, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        x = x.flatten(1)
        return (self.head(x), self.spare(x)) if self.training else self.head(x)


@pytest.mark.parametrize("zeros", [False, True])
def test_layers_that_are_not_used_do_not_matter(zeros: bool) -> None:
    model, private = seeded(Spare())[0].eval(), photos(1, 16)
    loss = F.cross_entropy(model((private - 0.5) / 0.25), torch.tensor([3]))
    gradient = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=zeros)
    found = api.reconstruct(model, gradient, (1, 3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, steps=1)
    assert found.compared(private)[0]["outcome"] == "exact"


class Attentive(nn.Module):
    """Attention over patches, by the module and by the function."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.linear = nn.Conv2d(3, 48, 4, 4), nn.Linear(48, 48)
        self.attention, self.head = nn.MultiheadAttention(48, 4, batch_first=True), nn.Linear(48 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + F.scaled_dot_product_attention(self.linear(tokens), tokens, tokens)
        return self.head(tokens.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 2])
def test_attention_is_attacked(count: int) -> None:
    """PyTorch's fast kernels for it have no second derivative."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, private = Attentive(), photos(count, 16).float()
    found = api.reconstruct(
        model, taken(model, private, range(count)), (count, 3, 16, 16), mean=MEAN, std=STD, steps=20
    )
    assert {row["outcome"] for row in found.compared(private)} <= {"recognisable", "exact"}


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, partial(torch.compile, backend="eager")])
def test_a_wrapped_model_is_attacked_as_what_is_in_it(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, private = convolutional(nn.Sigmoid), photos(1, 32)
    gradient, wrapped = taken(model, private, [7]), wrap(model)
    named = dict(zip(dict(wrapped.named_parameters()), gradient, strict=True))
    bare, theirs, by_name = (
        api.reconstruct(attacked, told, (1, 3, 32, 32), mean=MEAN, std=STD, steps=1)
        for attacked, told in ((model, gradient), (wrapped, gradient), (wrapped, named))
    )
    assert torch.equal(bare.images, theirs.images)
    assert torch.equal(bare.images, by_name.images)


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
    with pytest.raises(UsageError, match=r"gradient of the last layer's weight, 5.weight, got None"):
        api.reconstruct(model, [weight.grad for weight in model.parameters()], shape)
    with pytest.raises(UsageError, match="each of 6 parameters, got 1"):
        api.reconstruct(model, {"6.weight": gradient[0]}, shape)
    with pytest.raises(UsageError, match=r"that torch\.fx traces"):
        api.reconstruct(model, gradient, (1, 1, 32, 32))
    with pytest.raises(UsageError, match="one that attacks"):
        api.reconstruct(model, gradient, shape, attack="none")
    with pytest.raises(UsageError, match="did you mean 'spectral'"):
        api.reconstruct(model, gradient, shape, attack="spectrall")
