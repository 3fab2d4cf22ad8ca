"""Models of one's own under attack: what they compute, against the models themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dlgbench.datasets import prepare
from dlgbench.errors import UsageError
from dlgbench.leak import gradients
from dlgbench.models import adapted, withhold

from .clients import PHOTOS

MEAN, STD, SHAPE = (0.5, 0.375, 0.25), (0.25, 0.5, 0.25), (2, 3, 16, 16)
LABELS = torch.tensor([1, 4])


def photos() -> Tensor:
    return torch.stack([prepare(PHOTOS.image(i), 16, "fit", 3) for i in (0, 1)]).double()


def loss(model: nn.Module, weights: tuple[float, ...] = (1.0,)) -> Tensor:
    """As a user would compute it."""
    outputs = model((photos() - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    terms = [w * F.cross_entropy(head, LABELS) for w, head in zip(weights, outputs, strict=True)]
    return torch.stack(terms).sum()


def assert_same_gradient(model: nn.Module, heads: tuple[float, ...] = (1.0,)) -> None:
    """The network's own gradient on the private batch is the one that a user takes of the model."""
    network = adapted(model, SHAPE, MEAN, STD, heads)
    weights, buffers = network.named_parameters(), dict(network.named_buffers())
    ours = gradients(
        network,
        {name: weight.detach() for name, weight in weights},
        buffers,
        photos(),
        F.one_hot(LABELS, 5).double(),
    )
    theirs = torch.autograd.grad(loss(model, heads), list(model.parameters()))
    for (name, _), true in zip(model.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(ours[f"body.{name}"], true, rtol=1e-10, atol=1e-14)


def built(*layers: nn.Module) -> nn.Module:
    """These layers and a head, with weights and statistics that differ from channel to channel."""
    features = nn.Sequential(*layers, nn.Flatten())
    model = nn.Sequential(features, nn.Linear(features(torch.zeros(SHAPE)).shape[1], 5)).double()
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    return model


class Function(nn.Module):
    """A layer of a function."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 6, 3, 2, 1),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3),
    "dilated": nn.Conv2d(3, 6, 3, dilation=2),
    "unequal strides": nn.Conv2d(3, 6, 3, stride=(1, 2)),
    "padded by reflection": nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
    "padded to the same": nn.Conv2d(3, 6, 3, padding="same"),
    "valid": nn.Conv2d(3, 6, 3, padding="valid"),
    "transposed": nn.ConvTranspose2d(3, 6, 3, 2),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(3),
    "batch, without weights": lambda: nn.BatchNorm2d(3, affine=False),
    "batch, without statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "batch, flat": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768)),
    "instance": lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(3, 3),
    "layer": lambda: nn.LayerNorm(16),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution_is_what_it_is(name: str) -> None:
    assert_same_gradient(built(CONVOLUTIONS[name], nn.Sigmoid()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_every_norm_is_in_its_own_mode(name: str, training: bool) -> None:
    assert_same_gradient(built(NORMS[name](), nn.Sigmoid(), nn.Dropout(0.0)).train(training))


def test_a_frozen_norm_in_a_model_that_trains_stays_frozen() -> None:
    model = built(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model.get_submodule("0.0").eval()
    assert_same_gradient(model)


def test_dropout_that_is_off_is_off() -> None:
    model = built(nn.Dropout(0.5), nn.ReLU()).eval()
    assert_same_gradient(model)
    assert not adapted(model, SHAPE, MEAN, STD).has_masks
    assert adapted(model.train(), SHAPE, MEAN, STD).has_masks


@pytest.mark.parametrize("function", [nn.LogSoftmax(1), Function(lambda self, x: F.log_softmax(x, 1))])
def test_logarithms_of_probabilities_are_logits(function: nn.Module) -> None:
    """As models end that were written for the negative log likelihood."""
    assert_same_gradient(nn.Sequential(built(nn.Sigmoid()), function))


@pytest.mark.parametrize("layer", [nn.Hardsigmoid(), Function(lambda self, x: F.hardsigmoid(x))])
def test_what_pytorch_cannot_differentiate_twice_can_be(layer: nn.Module) -> None:
    model = built(nn.AvgPool2d(8), layer)
    assert_same_gradient(model)
    network = adapted(model, SHAPE, MEAN, STD)
    assert torch.autograd.gradgradcheck(lambda x: network(x)[0], photos().requires_grad_())


class Branched(nn.Module):
    """Two heads of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = built(nn.Sigmoid()), built(nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_heads_are_weighted() -> None:
    assert_same_gradient(Branched(), (1.0, 0.3))
    with pytest.raises(UsageError, match="weights of 2 heads' losses, `heads`, got 1"):
        adapted(Branched(), SHAPE, MEAN, STD)


@pytest.mark.parametrize(
    "layer",
    [
        Function(lambda self, x: F.dropout(x, 0.5, self.training)),
        nn.Dropout2d(0.5),
        torchvision.ops.StochasticDepth(1e-6, "row"),
    ],
)
def test_draws_that_no_attack_would_know_of_are_refused(layer: nn.Module) -> None:
    model = built(layer)
    with pytest.raises(UsageError, match=r"draws at random by nn\.Dropout alone"):
        adapted(model, SHAPE, MEAN, STD)
    assert_same_gradient(model.eval())


def test_a_model_that_its_trace_is_not_is_refused() -> None:
    numbers = itertools.count(1)
    counting = built(Function(lambda self, x: x * next(numbers)))
    with pytest.raises(UsageError, match="may keep a state"):
        adapted(counting, SHAPE, MEAN, STD)


@pytest.mark.parametrize("end", [nn.Conv2d(4, 5, 14), nn.Softmax(1)])
def test_what_has_no_linear_head_is_refused(end: nn.Module) -> None:
    with pytest.raises(UsageError, match=rf"last layer is nn\.Linear, got {type(end).__name__}"):
        adapted(nn.Sequential(nn.Conv2d(3, 4, 3), end), SHAPE, MEAN, STD)


def test_what_is_withheld_is_no_parameter_but_counts() -> None:
    model = built(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    whole, some = (adapted(model, SHAPE, MEAN, STD) for _ in range(2))
    left = ["0.0.bias", "0.1.weight", "1.weight", "1.bias"]
    withhold(some, {*left, "of a layer that is not used"})
    assert whole.state_dict().keys() == some.state_dict().keys()
    assert [name for name, _ in some.named_parameters()] == [f"body.{name}" for name in left]
    torch.testing.assert_close(whole(photos()), some(photos()))
    with pytest.raises(UsageError, match=r"of the last layer's weight, 1\.weight, got None"):
        withhold(some, {"1.bias"})
