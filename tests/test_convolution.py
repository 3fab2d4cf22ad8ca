"""Convolution as a product of matrices, against PyTorch's own and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dlgbench.convolution import Conv2d


def layer(channels: int, kernel: int, stride: int, padding: int) -> Conv2d:
    plain = nn.Conv2d(channels, 4, kernel, stride, padding).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, generator=generator)
    return Conv2d(plain)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def traced(ours: Conv2d, x: Tensor) -> fx.GraphModule:
    """The layer as it stands in a graph, a function of images and weight."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(ours, {"weight": weight}, (x,))
        return output

    return make_fx(function)(x, ours.weight.detach())


@given(
    count=st.integers(1, 3), channels=st.integers(1, 3), stride=st.integers(1, 3), more=st.integers(0, 3),
    padding=st.integers(0, 3), height=st.integers(6, 11), width=st.integers(6, 11),
)  # fmt: skip
def test_in_a_graph_it_is_pytorchs_convolution(
    count: int, channels: int, stride: int, more: int, padding: int, height: int, width: int
) -> None:
    ours, x = layer(channels, stride + more, stride, padding), images(count, channels, height, width)
    found = traced(ours, x)(x, ours.weight)
    torch.testing.assert_close(found, F.conv2d(x, ours.weight, ours.bias, stride, padding))
    torch.testing.assert_close(ours(x), found)


def test_a_graph_holds_no_convolution() -> None:
    ours, x = layer(2, 3, 1, 1), images(1, 2, 6, 6)
    names = {str(node.target) for node in traced(ours, x).graph.nodes}
    assert not any("convolution" in name for name in names)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(5, 2, 2), (3, 1, 0), (4, 3, 1)])
def test_first_and_second_derivatives_are_those_of_finite_differences(
    kernel: int, stride: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlgbench.convolution.get_proxy_mode", object)  # as if it were traced
    ours = layer(2, kernel, stride, padding)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(ours, {"weight": weight}, (x,))
        return output

    inputs = (images(2, 2, 7, 6).requires_grad_(), ours.weight)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_rows_under_vmap_are_the_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlgbench.convolution.get_proxy_mode", object)
    ours, x, weights = layer(2, 3, 2, 1), images(3, 1, 2, 7, 7), images(3, 4, 2, 3, 3)

    def second(x: Tensor, weight: Tensor) -> Tensor:
        def norm(weight: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(ours, {"weight": weight}, (x,))
            return output.cos().sum()

        gradient: Tensor = torch.func.grad(norm)(weight)
        return gradient.square().sum()

    together = torch.func.vmap(torch.func.grad(second))(x, weights)
    for row in range(3):
        torch.testing.assert_close(together[row], torch.func.grad(second)(x[row], weights[row]))
