"""Batch norm with its hand-made derivatives, against PyTorch's and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlgbench.batchnorm import BatchNorm2d


def layer(channels: int = 3) -> BatchNorm2d:
    plain = nn.BatchNorm2d(channels, eps=1e-3).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, generator=generator)
    return BatchNorm2d(plain)


def features(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a graph were being traced: otherwise the layer is PyTorch's."""
    monkeypatch.setattr("dlgbench.batchnorm.get_proxy_mode", object)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 2, 2), (4, 3, 1, 1)])
def test_it_is_pytorchs_batch_norm_in_train_mode(shape: tuple[int, ...]) -> None:
    ours, x = layer(), features(*shape)
    theirs = F.batch_norm(x, None, None, ours.weight, ours.bias, training=True, eps=1e-3)
    torch.testing.assert_close(ours(x), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (1, 3, 2, 2)])
def test_first_and_second_derivatives_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    ours = layer()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        output: Tensor = torch.func.functional_call(ours, parameters, (x,))
        return output.sin()  # or else the derivatives in the bias would be constants

    inputs = (features(*shape).requires_grad_(), ours.weight, ours.bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_it_is_pytorchs_unless_traced() -> None:
    ours, x = layer(), features(2, 3, 4, 5).requires_grad_()
    assert type(ours(x).grad_fn).__name__ == "NativeBatchNormBackward0"


@pytest.mark.usefixtures("traced")
def test_rows_under_vmap_are_the_rows_alone() -> None:
    ours, x = layer(), features(4, 2, 3, 3, 3)

    def second(x: Tensor) -> Tensor:
        def norm(weight: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(ours, {"weight": weight, "bias": ours.bias}, (x,))
            return output.cos().sum()

        gradient: Tensor = torch.func.grad(norm)(ours.weight.detach())
        return gradient.square().sum()

    together = torch.func.vmap(torch.func.grad(second))(x)
    for row in range(4):
        torch.testing.assert_close(together[row], torch.func.grad(second)(x[row]), rtol=1e-10, atol=1e-12)


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer()(features(1, 3, 1, 1))
