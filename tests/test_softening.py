"""ReLU made smooth for the attacker: close to ReLU, and with derivatives that ReLU does not have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dlgbench.leak import gradients
from dlgbench.networks import build
from dlgbench.prepare import SHARPNESS, soft_relu, softened
from dlgbench.registry import NETWORKS


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_it_differs_from_relu_by_the_bend_alone(scale: float) -> None:
    x = scale * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    width = float(x.square().mean().sqrt()) / SHARPNESS
    difference = soft_relu(x) - F.relu(x)
    most = width * torch.log(torch.tensor(2.0))  # softplus at 0
    assert difference.min() > -1e-12 * scale  # rounding
    assert difference.max() <= most * (1 + 1e-3)
    assert difference[x.abs() > 20 * width].abs().max() < 1e-6 * width


def test_features_of_zero_are_no_fault() -> None:
    x = torch.zeros(5, requires_grad=True)
    (first,) = torch.autograd.grad(soft_relu(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("text", ["lenet5:activation=relu", "resnet18:activation=relu,batchnorm=eval"])
def test_a_softened_network_is_nearly_the_same(text: str) -> None:
    network = build(NETWORKS.spec(text), (1, 3, 32, 32), 10, 0, torch.float64)
    soft = softened(network)
    assert all(ours is theirs for ours, theirs in zip(soft.parameters(), network.parameters(), strict=True))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label = F.one_hot(torch.tensor([3]), 10).double()
    ours, theirs = (gradients(n, dict(n.named_parameters()), {}, image, label) for n in (soft, network))
    for name, gradient in theirs.items():
        assert 0 < (ours[name] - gradient).norm() < 0.15 * gradient.norm(), name


def test_a_network_without_relu_stays_as_it_is() -> None:
    network = build(NETWORKS.spec("lenet5"), (1, 3, 32, 32), 10, 0)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(softened(network)(image)[0], network(image)[0])
