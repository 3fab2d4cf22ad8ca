"""The image behind known layers, and what of a graph they need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from dlgbench.inversion import frontier, trunk
from dlgbench.metrics import mean_squared_error, psnr
from dlgbench.peeling import peel
from dlgbench.victims import network_of, secret_of

from .clients import PHOTOS, case, leaked


class Forked(nn.Module):
    """x → a; (a, a → b) → c → d"""

    def forward(self, x: Tensor) -> Tensor:
        a = torch.sin(x)
        b = torch.cos(a)
        c = torch.add(a, b)
        return torch.neg(c)


def forked() -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    body = fx.symbolic_trace(Forked())
    return body, {node.name: node for node in body.graph.nodes}


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ("neg", "neg"),
        ("neg add", "add"),
        ("add cos", "add cos"),
        ("cos sin add", "sin"),
        ("neg cos", "neg cos"),
    ],
)
def test_what_known_nodes_determine_needs_no_matching(known: str, wanted: str) -> None:
    body, nodes = forked()
    values = {nodes[name]: torch.zeros(1) for name in known.split()}
    assert {node.name for node in frontier(body, values)} == set(wanted.split())


def test_a_trunk_gives_what_its_ends_are() -> None:
    body, nodes = forked()
    part = trunk(body, [nodes["cos"], nodes["sin"]])
    x = torch.rand(3)
    cos, sin = part(x)
    assert torch.equal(cos, x.sin().cos())
    assert torch.equal(sin, x.sin())
    assert {node.name for node in part.graph.nodes} == {"x", "sin", "cos", "output"}


def test_a_trunk_may_begin_anywhere() -> None:
    body, nodes = forked()
    part = trunk(body, [nodes["neg"], nodes["sin"]], nodes["sin"])
    x = torch.rand(3)
    neg, sin = part(x)
    assert torch.equal(neg, -(x + x.cos()))
    assert torch.equal(sin, x)
    assert {node.op for node in part.graph.nodes} == {"placeholder", "call_function", "output"}


@pytest.mark.parametrize("image", [0, 1, 2])
def test_a_photo_is_recognised_from_a_rectified_residual_network(image: int) -> None:
    """Published of ReLU and 224 px: 15.75 dB (Guo et al. 2025, arXiv 2503.11514)."""
    one = case(network="resnet18:activation=relu,batchnorm=eval", image=image, resolution=64, dtype="float32")
    ((_, found),) = peel(network_of(one), leaked(one), one.shape)
    error = mean_squared_error(found, secret_of(one, PHOTOS).images[0])
    assert float(psnr(error)) > 25  # measured: 27.9, 36.8, 30.2


def test_two_photos_come_back_in_the_order_of_their_labels() -> None:
    one = case(
        network="resnet18:activation=relu,batchnorm=eval", image=0, batch=2, resolution=64, dtype="float32"
    )
    heard = list[float]()
    ((_, found),) = peel(network_of(one), leaked(one), one.shape, heard.append)
    assert min(heard) < heard[0] / 10
    secret = secret_of(one, PHOTOS)
    order = secret.labels[0].argsort()
    for image, truth in zip(found, secret.images[0][order], strict=True):
        assert float(psnr(mean_squared_error(image[None], truth[None]))) > 25  # measured: 27.0 and 36.1


def test_too_few_layers_show_no_image() -> None:
    """Where units are not rectified, only the topmost layer is told."""
    one = case(network="resnet18:batchnorm=eval", resolution=64, dtype="float32")
    assert not list(peel(network_of(one), leaked(one), one.shape))
