"""The equations of a convolution's input against PyTorch's own convolution and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dlgbench.convolution import Conv2d
from dlgbench.equations import Equations

SHAPE = torch.Size((3, 7, 6))


def layer_of(stride: int, padding: int, kernel: int = 3) -> Conv2d:
    layer = nn.Conv2d(3, 4, kernel, stride=stride, padding=padding, bias=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(kernel)
    layer.weight.data.normal_(generator=generator)
    return Conv2d(layer)


def facts(layer: Conv2d, seed: int, share: float = 0.7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An input, its output, which of it is known, a slope there, and the weight's gradient."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    weight = layer.weight.detach().clone().requires_grad_()
    output = F.conv2d(inputs[None], weight, None, layer.stride, layer.padding)[0]
    known = torch.rand(output.shape, generator=generator) < share
    slope = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(output, weight, slope)
    return inputs, output.detach(), known, slope, gradient


@given(st.integers(0, 1000), st.sampled_from([(1, 0), (1, 1), (2, 1), (2, 2), (3, 0)]), st.integers(1, 4))
def test_an_input_meets_its_equations(seed: int, geometry: tuple[int, int], kernel: int) -> None:
    layer = layer_of(*geometry, kernel)
    inputs, output, known, slope, gradient = facts(layer, seed)
    equations = Equations(layer, layer.weight.detach(), SHAPE, known, slope)
    wanted = equations.wanted(output, gradient)
    assert len(wanted) == known.sum() + gradient.numel()
    assert float(equations.misfit(inputs.flatten(), wanted)) < 1e-13
    assert float(equations.misfit(2 * inputs.flatten(), wanted)) == pytest.approx(1)


@given(st.integers(0, 1000), st.sampled_from([(1, 1), (2, 2), (2, 0)]))
def test_transpose_and_gram_matrix_are_those_of_the_equations(seed: int, geometry: tuple[int, int]) -> None:
    layer = layer_of(*geometry)
    _, _, known, slope, _ = facts(layer, seed)
    equations = Equations(layer, layer.weight.detach(), SHAPE, known, slope)
    matrix = torch.stack([equations.times(unit) for unit in torch.eye(SHAPE.numel()).double()], 1)
    torch.testing.assert_close(matrix.norm(dim=1), torch.ones(len(matrix)).double())
    torch.testing.assert_close(equations.gram(), matrix.T @ matrix)
    sides = torch.randn(len(matrix), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(equations.transposed(sides), matrix.T @ sides)
