"""Batch norm behind concatenations: the same values, finite differences, and nothing worked out twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from dlgbench import dense
from dlgbench.batchnorm import BatchNorm2d, SharedBatchNorm2d, normalised


class Block(nn.Module):
    """Two layers, each of which sees all channels before it, in order or the last first, and a last norm."""

    def __init__(self, step: int = 1) -> None:
        super().__init__()
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, (3, 5, 7)))
        self.layers = nn.ModuleList(nn.Conv2d(width, 2, 1) for width in (3, 5))
        self.step = step

    def forward(self, features: Tensor) -> Tensor:
        parts = [features]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            parts.append(layer(norm(torch.cat(parts[:: self.step], 1)).sigmoid()))
        last: Tensor = self.norms[2](torch.cat(parts, dim=1))
        return last.sigmoid()


def made(module: nn.Module, kind: type[BatchNorm2d] = BatchNorm2d) -> fx.GraphModule:
    """The module as networks have it: traced, and then given norms of this kind."""
    body = fx.symbolic_trace(module.double())
    generator = torch.Generator().manual_seed(0)
    for parameter in body.parameters():
        nn.init.normal_(parameter, generator=generator)
    for name, layer in list(body.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            body.set_submodule(name, kind(layer))
    return body


def features() -> Tensor:
    return torch.randn(2, 3, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def normalisations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if a graph were being traced; and how many channels were normalised in every call."""
    found: list[int] = []

    def spy(features: Tensor, eps: float) -> Tensor:
        found.append(features.shape[1])
        return normalised(features, eps)

    monkeypatch.setattr("dlgbench.dense.get_proxy_mode", object)
    monkeypatch.setattr("dlgbench.dense.normalised", spy)
    return found


@pytest.mark.parametrize("step", [1, -1])
def test_every_channel_is_normalised_once(normalisations: list[int], step: int) -> None:
    body = made(Block(step))
    torch.testing.assert_close(dense.run(body, features()), body(features()), rtol=1e-12, atol=1e-12)
    assert normalisations == [3, 2, 2]


class Written(nn.Module):
    """Features that are written to after they were normalised once."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, (3, 3, 3, 3)))

    def forward(self, features: Tensor) -> Tensor:
        part = features * 2
        before: Tensor = self.norms[0](torch.cat([part], 1))
        part.sigmoid_()
        after = torch.cat([part], 1)
        between = self.norms[1](after)
        part.square_()
        result: Tensor = before * between * self.norms[2](after) * self.norms[3](after.exp_())
        return result


@pytest.mark.usefixtures("normalisations")
def test_what_is_written_to_is_normalised_again() -> None:
    body = made(Written())
    torch.testing.assert_close(dense.run(body, features()), body(features()), rtol=1e-12, atol=1e-12)


class Run(nn.Module):
    """What `dense.run` makes of a body, as a module."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = dense.run(self.body, features)
        return output


@pytest.mark.usefixtures("normalisations")
def test_first_and_second_derivatives_are_those_of_finite_differences() -> None:
    module = Run(made(Block()))
    names = dict(module.named_parameters())

    def function(features: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(names, weights, strict=True))
        output: Tensor = torch.func.functional_call(module, named, features)
        return output

    inputs = (features().requires_grad_(), *names.values())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_norms_that_are_looked_into_see_all_that_enters_them(normalisations: list[int]) -> None:
    body, seen = made(Block(), SharedBatchNorm2d), list[int]()
    for module in body.modules():
        if isinstance(module, SharedBatchNorm2d):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    dense.run(body, features())
    assert seen == [3, 5, 7]
    assert normalisations == []


class Twice(nn.Module):
    """Images, and their squares behind them."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features, features.square()])


def test_images_that_are_concatenated_are_normalised_together(normalisations: list[int]) -> None:
    body = made(nn.Sequential(Twice(), nn.BatchNorm2d(3)))
    torch.testing.assert_close(dense.run(body, features()), body(features()), rtol=1e-12, atol=1e-12)
    assert normalisations == []
