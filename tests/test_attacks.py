"""The published attacks against bare loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from dlgbench.benchmarks.textbook import model
from torch import Tensor, nn

from dlgbench.case import Case, stream
from dlgbench.victims import network_of, secret_of

from .clients import ATTACKERS, PHOTOS, case, fitted, leaked


def textbook(one: Case) -> tuple[nn.Module, Sequence[Tensor], Tensor, Tensor]:
    """A plain network, the gradient it leaks, the start and the true label."""
    weights, secret = list(network_of(one).parameters()), secret_of(one, PHOTOS)
    body = model("lenet_dlg", weights)
    gradient = torch.autograd.grad(
        F.cross_entropy(body(secret.images[0]), secret.labels[0]), body.parameters()
    )
    generator = torch.Generator().manual_seed(stream(one, "attack"))
    start = torch.randn(1, 3, 32, 32, generator=generator).double().requires_grad_()
    return body, gradient, start, secret.labels[0]


def test_idlg_is_the_textbook_loop_with_the_label_known() -> None:
    one = case(attack="idlg")
    body, target, image, label = textbook(one)
    optimizer = torch.optim.LBFGS([image], lr=1, max_iter=20, history_size=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        ours = torch.autograd.grad(
            F.cross_entropy(body(image), label), list(body.parameters()), create_graph=True
        )
        distance = torch.stack([(a - b).square().sum() for a, b in zip(ours, target, strict=True)]).sum()
        image.grad = torch.autograd.grad(distance, image)[0]
        return distance

    for _ in range(one.steps):
        cast(Any, optimizer).step(closure)
    attack = fitted(one, leaked(one))
    torch.testing.assert_close(attack.dummy_images.detach()[0], image.detach(), rtol=1e-6, atol=1e-8)
    assert attack.result.labels[0].argmax(-1).tolist() == label.tolist()


def test_inverting_gradients_is_the_papers_loop() -> None:
    one = case(attack="inverting_gradients:iterations=3", steps=8)
    body, target, image, label = textbook(one)
    optimizer = torch.optim.Adam([image], lr=0.1)
    theirs = torch.cat([gradient.flatten() for gradient in target])
    for iteration in range(24):
        optimizer.param_groups[0]["lr"] = 0.1 ** (1 + sum(iteration >= fall for fall in (9, 15, 21)))
        ours = torch.autograd.grad(
            F.cross_entropy(body(image), label), list(body.parameters()), create_graph=True
        )
        ours_flat = torch.cat([gradient.flatten() for gradient in ours])
        rows, columns = ((image - image.roll(1, dim)).abs() for dim in (2, 3))
        variation = rows[:, :, 1:].mean() + columns[..., 1:].mean()
        distance = 1 - F.cosine_similarity(ours_flat, theirs, dim=0) + 1e-2 * variation
        image.grad = torch.autograd.grad(distance, image)[0].sign()
        optimizer.step()
        image.data.clamp_(0, 1)
    attack = fitted(one, leaked(one))
    torch.testing.assert_close(attack.dummy_images.detach()[0], image.detach(), rtol=1e-9, atol=1e-9)


def test_analytic_tells_what_labels_alone_tell_where_layers_cannot_be_inverted() -> None:
    attack = fitted(
        case(attack="analytic", network="lenet5", steps=1),
        leaked(case(attack="analytic", network="lenet5")),
    )
    assert set(attack.result.images.flatten().tolist()) == {0.5}
    assert int(attack.result.labels.argmax()) == int(secret_of(case(attack="analytic"), PHOTOS).labels)


@pytest.mark.parametrize("factor", [0, torch.nan])
@pytest.mark.parametrize("name", ATTACKERS)
def test_a_gradient_that_tells_nothing_breaks_no_attack(name: str, factor: float) -> None:
    one = case(attack=name)
    leak = leaked(one)
    silent = leak._replace(gradients={n: gradient * factor for n, gradient in leak.gradients.items()})
    assert fitted(one, silent).result.images.shape == (1, 1, 3, 32, 32)
