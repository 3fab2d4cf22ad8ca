"""ReLU and maxima made smooth for the attacker: close to them, and with derivatives that they do not have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dlgbench.leak import gradients
from dlgbench.networks import build
from dlgbench.registry import NETWORKS
from dlgbench.softening import (
    POOL,
    RELU,
    SHARPNESS,
    adjustable,
    bent,
    level_max_pool,
    soft_max_pool,
    soft_relu,
    softened,
)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("sharpness", [1.0, RELU])
def test_it_differs_from_relu_by_the_bend_alone(scale: float, sharpness: float) -> None:
    x = scale * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    width = float(x.square().mean().sqrt()) / sharpness
    difference = soft_relu(x, sharpness) - F.relu(x)
    most = width * torch.log(torch.tensor(2.0))  # softplus at 0
    assert difference.min() > -1e-12 * scale  # rounding
    assert difference.max() <= most * (1 + 1e-3)
    assert difference[x.abs() > 20 * width].abs().sum() < 1e-6 * width


def test_features_of_zero_are_no_fault() -> None:
    x = torch.zeros(5, requires_grad=True)
    (first,) = torch.autograd.grad(soft_relu(x, RELU).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (3, 2, 0), (2, 2, 0)])
def test_a_soft_maximum_lies_between_the_windows_mean_and_its_maximum(
    size: int, stride: int, padding: int
) -> None:
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    soft, hard = soft_max_pool(x, size, stride, padding), F.max_pool2d(x, size, stride, padding)
    mean = F.avg_pool2d(x, size, stride, padding, count_include_pad=False)
    assert soft.shape == hard.shape
    assert (soft <= hard + 1e-12).all()
    assert (soft >= mean - 1e-12).all()
    # sum of softmax(t) (max - t) is at most log of the window's size, in units of the width
    width = float(x.std(correction=0)) / POOL
    assert (hard - soft).max() <= width * torch.log(torch.tensor(float(size * size)))


@pytest.mark.parametrize("padding", [0, 1])
def test_a_soft_maximum_has_both_derivatives(padding: int) -> None:
    x = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: soft_max_pool(x, 3, 2, padding), x.requires_grad_())


def test_a_soft_maximum_may_be_anything_from_the_mean_to_the_maximum() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(soft_max_pool(x, 2, 2, sharpness=1e-6), F.avg_pool2d(x, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(soft_max_pool(x, 2, 2, sharpness=1e6), F.max_pool2d(x, 2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sharpness", [0.5, 16.0])
def test_a_level_maximum_is_a_soft_one_of_the_maximums_mean(sharpness: float) -> None:
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level, soft = (pool(x, 3, 2, 1, sharpness) for pool in (level_max_pool, soft_max_pool))
    raised = level - soft
    torch.testing.assert_close(raised, raised[:, :, :1, :1].expand_as(raised))
    torch.testing.assert_close(level.mean((2, 3)), F.max_pool2d(x, 3, 2, 1).mean((2, 3)))


def test_a_soft_maximum_is_the_weighted_mean_that_it_says() -> None:
    x = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]], dtype=torch.float64)
    weights = (x.flatten() * POOL / x.std(correction=0)).exp()
    expected = float((weights * x.flatten()).sum() / weights.sum())
    assert float(soft_max_pool(x, 2, 2)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("text", ["resnet18", "densenet121", "inception_v3:dropout=known"])
def test_no_maximum_is_left(text: str) -> None:
    side = 299 if text.startswith("inception") else 64
    soft = softened(build(NETWORKS.spec(text), (2, 3, side, side), 10, 0))
    assert not any(node.target is F.max_pool2d for node in soft.body.graph.nodes)  # type: ignore[union-attr]
    assert sum(node.target is soft_max_pool for node in soft.body.graph.nodes) == (  # type: ignore[union-attr]
        4 if text.startswith("inception") else 1
    )


@pytest.mark.parametrize(
    ("text", "share"), [("lenet5:activation=relu", 0.15), ("resnet18:activation=relu,batchnorm=eval", 0.25)]
)
def test_a_softened_network_is_nearly_the_same(text: str, share: float) -> None:
    """The maximum, which lenet5 lacks, is much softer than ReLU."""
    network = build(NETWORKS.spec(text), (1, 3, 32, 32), 10, 0, torch.float64)
    soft = softened(network)
    assert all(ours is theirs for ours, theirs in zip(soft.parameters(), network.parameters(), strict=True))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label = F.one_hot(torch.tensor([3]), 10).double()
    ours, theirs = (gradients(n, dict(n.named_parameters()), {}, image, label) for n in (soft, network))
    for name, gradient in theirs.items():
        assert 0 < (ours[name] - gradient).norm() < share * gradient.norm(), name


def test_adjustable_maxima_are_as_sharp_as_the_buffer_says() -> None:
    network = build(NETWORKS.spec("resnet18"), (1, 3, 64, 64), 10, 0, torch.float64)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    soft = adjustable(network)
    assert soft.get_buffer(SHARPNESS) == POOL
    for sharpness in (0.5, POOL, 32.0):
        soft.get_buffer(SHARPNESS).fill_(sharpness)
        expected = bent(network.body, RELU, sharpness)(network.normalise(image))  # type: ignore[arg-type]
        torch.testing.assert_close(soft(image)[0], expected)


def test_a_network_without_maxima_has_none_to_adjust() -> None:
    soft = adjustable(build(NETWORKS.spec("lenet5"), (1, 3, 32, 32), 10, 0))
    assert SHARPNESS not in dict(soft.named_buffers())


def test_a_network_without_kinks_stays_as_it_is() -> None:
    network = build(NETWORKS.spec("lenet5"), (1, 3, 32, 32), 10, 0)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(softened(network)(image)[0], network(image)[0])
