"""Convolution as a product of matrices, against PyTorch's own and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dlgbench import winograd
from dlgbench.convolution import Conv2d
from dlgbench.window import Window


def layer(
    channels: int,
    kernel: int | tuple[int, int],
    stride: int,
    padding: int | tuple[int, int],
    kernels: int = 4,
) -> Conv2d:
    plain = nn.Conv2d(channels, kernels, kernel, stride, padding).double()
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
    count=st.integers(1, 3), channels=st.integers(1, 3), stride=st.integers(1, 3), padding=st.integers(0, 3),
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)), kernels=st.sampled_from([4, 32]),
    height=st.integers(6, 15), width=st.integers(6, 15),
)  # fmt: skip
def test_in_a_graph_it_is_pytorchs_convolution(
    count: int, channels: int, stride: int, padding: int, kernel: tuple[int, int], kernels: int,
    height: int, width: int,
) -> None:  # fmt: skip
    ours, x = layer(channels, kernel, stride, padding, kernels), images(count, channels, height, width)
    found = traced(ours, x)(x, ours.weight)
    torch.testing.assert_close(found, F.conv2d(x, ours.weight, ours.bias, stride, padding))
    torch.testing.assert_close(ours(x), found)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_winograds_maps_are_a_convolution(side: int, padding: int) -> None:
    x, weight = images(2, side, side + 1, 3), images(5, 3, 3, 3)
    window = Window.of((3, 3), 1, (padding, padding), (side, side + 1))
    found = winograd.convolution(x, weight, window)
    truth = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), padding=padding)
    torch.testing.assert_close(found.permute(0, 3, 1, 2), truth)


def test_winograds_maps_err_like_the_direct_sum() -> None:
    """Measured: 0.6 times as much."""
    x, weight = images(1, 56, 56, 64), images(64, 3, 3, 64)
    truth = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), padding=1)
    window = Window.of((3, 3), 1, (1, 1), (56, 56))
    ours = winograd.convolution(x.float(), weight.float(), window).permute(0, 3, 1, 2)
    theirs = F.conv2d(x.permute(0, 3, 1, 2).float(), weight.permute(0, 3, 1, 2).float(), padding=1)
    assert (ours - truth).norm() < 1.5 * (theirs - truth).norm()


@pytest.mark.parametrize(
    ("kernel", "stride", "kernels", "side", "count"),
    [
        (3, 1, 4, 30, 0), (1, 1, 64, 30, 0), (3, 1, 64, 10, 0), (7, 2, 64, 30, 0), (3, 1, 64, 30, 1),
        (5, 1, 64, 10, 0), (5, 1, 64, 30, 1),
    ],
)  # fmt: skip
def test_a_graph_holds_no_convolution_but_where_copies_would_be_large(
    kernel: int, stride: int, kernels: int, side: int, count: int
) -> None:
    ours, x = layer(2, kernel, stride, kernel // 2, kernels), images(1, 2, side, side)
    names = [str(node.target) for node in traced(ours, x).graph.nodes]
    assert sum("convolution" in name for name in names) == count


def test_a_graph_of_winograds_maps_has_sixteen_products() -> None:
    ours, x = layer(64, 3, 1, 1, 64), images(1, 64, 14, 14)
    products = [node for node in traced(ours, x).graph.nodes if "bmm" in str(node.target)]
    assert [tuple(node.meta["val"].shape) for node in products] == [(16, 49, 64)]


@pytest.mark.parametrize("vector", [1, 32])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(5, 2, 2), (3, 1, 0), (3, 1, 1), (4, 3, 1), (1, 1, 0), (1, 2, 0), ((1, 3), 1, (0, 1))],
)
def test_first_and_second_derivatives_are_those_of_finite_differences(
    kernel: int, stride: int, padding: int, vector: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlgbench.convolution.get_proxy_mode", object)  # as if it were traced
    monkeypatch.setattr("dlgbench.convolution.VECTOR", vector)  # either order in memory
    monkeypatch.setattr("dlgbench.convolution.TILES", 1)
    monkeypatch.setattr("dlgbench.convolution.CHANNELS", 0)
    ours = layer(2, kernel, stride, padding)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(ours, {"weight": weight}, (x,))
        return output

    inputs = (images(2, 2, 7, 6).requires_grad_(), ours.weight)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_what_its_windows_see_is_not_kept_for_the_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine numbers for every one of the features: a large part of what a closure's memory would be."""
    monkeypatch.setattr("dlgbench.convolution.get_proxy_mode", object)  # as if it were traced
    ours, x = layer(16, 3, 1, 1, 32), images(1, 16, 8, 8).requires_grad_()
    sizes: list[int] = []

    def note(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        output = ours(x)
        torch.autograd.grad(output.square().sum(), (x, ours.weight), create_graph=True)
    assert sizes
    assert max(sizes) == max(x.numel(), output.numel(), ours.weight.numel())


@pytest.mark.parametrize(("stride", "vector"), [(2, 32), (2, 1), (1, 1)])
def test_rows_under_vmap_are_the_rows_alone(
    stride: int, vector: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlgbench.convolution.get_proxy_mode", object)
    monkeypatch.setattr("dlgbench.convolution.VECTOR", vector)
    monkeypatch.setattr("dlgbench.convolution.TILES", 1)
    monkeypatch.setattr("dlgbench.convolution.CHANNELS", 0)
    ours, x, weights = layer(2, 3, stride, 1), images(3, 1, 2, 7, 7), images(3, 4, 2, 3, 3)

    def second(x: Tensor, weight: Tensor) -> Tensor:
        def norm(weight: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(ours, {"weight": weight}, (x,))
            return output.cos().sum()

        gradient: Tensor = torch.func.grad(norm)(weight)
        return gradient.square().sum()

    together = torch.func.vmap(torch.func.grad(second))(x, weights)
    for row in range(3):
        torch.testing.assert_close(together[row], torch.func.grad(second)(x[row], weights[row]))
