"""GradInversion, and the statistics that its client shares."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dlgbench import trial
from dlgbench.attacks.base import Attack
from dlgbench.attacks.gradinversion import GradInversion, NoisyAdam
from dlgbench.attacks.spectral import Spectral
from dlgbench.case import Case, stream
from dlgbench.leak import Leak, statistics
from dlgbench.networks import build
from dlgbench.prepare import replace_activation
from dlgbench.registry import ATTACKS, NETWORKS
from dlgbench.victims import leak_of, network_of, secret_of

from .clients import PHOTOS, case, fitted, leaked

CASE = case(
    network="resnet18:batchnorm=shared", attack="gradinversion:iterations=3", batch=2, resolution=64,
    preparation="crop", classes=10, image=0,
)  # fmt: skip


def attack_and_leak(one: Case = CASE) -> tuple[Attack, Leak]:
    return trial.attack_on([one], network_of(one)), leaked(one)


def torchvisions(leak: Leak) -> nn.Module:
    """ResNet-18 with the leaked weights and untouched batch norm, in train mode."""
    body = replace_activation(torchvision.models.resnet18(num_classes=10), "sigmoid").double().train()
    weights = {name.removeprefix("body."): tensor[0] for name, tensor in leak.weights.items()}
    body.load_state_dict(weights, strict=False)
    return body


def test_the_statistics_are_what_torch_would_have_gathered() -> None:
    _, leak = attack_and_leak()
    body, images = torchvisions(leak), secret_of(CASE, PHOTOS).images[0]
    for layer in body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    network = network_of(CASE)
    counts: dict[str, int] = {}
    for name, layer in body.named_modules():
        layer.register_forward_hook(
            lambda _, inputs, __, name=name: counts.update({name: inputs[0][:, 0].numel()})
        )
    body((images - network.mean) / network.std)
    shared = [name.removesuffix(".batch_mean") for name in leak.buffers if name.endswith(".batch_mean")]
    assert len(shared) == 20
    for name in shared:
        layer, count = body.get_submodule(name.removeprefix("body.")), counts[name.removeprefix("body.")]
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        torch.testing.assert_close(leak.buffers[f"{name}.batch_mean"][0], layer.running_mean)
        unbiased = leak.buffers[f"{name}.batch_var"][0] * count / (count - 1)  # torch keeps this one
        torch.testing.assert_close(unbiased, layer.running_var)


def test_the_objective_is_the_sum_of_its_terms_by_torchs_own_means() -> None:
    attack, leak = attack_and_leak(replace(CASE, attack=ATTACKS.spec("gradinversion:norm=1e-3,gradient=0.5")))
    body, network = torchvisions(leak), network_of(CASE)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)).double()
    labels = torch.randn(2, 10, generator=torch.Generator().manual_seed(4)).double()
    met: dict[str, Tensor] = {}
    for name, layer in body.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, inputs, __, name=name: met.update({name: inputs[0]}))
    normalised = (images - network.mean) / network.std
    loss = F.cross_entropy(body(normalised), labels.softmax(-1))
    ours = torch.autograd.grad(loss, list(body.parameters()))
    theirs = [leak.gradients[f"body.{name}"][0] for name, _ in body.named_parameters()]
    value = 0.5 * sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
    for name, features in met.items():
        flat = features.detach().transpose(0, 1).flatten(1)
        for kind, mine in (("mean", flat.mean(1)), ("var", flat.var(1, correction=0))):
            value += 0.1 * float((mine - leak.buffers[f"body.{name}.batch_{kind}"][0]).norm())
    across = (normalised[..., 1:] - normalised[..., :-1]).abs().mean()
    down = (normalised[..., 1:, :] - normalised[..., :-1, :]).abs().mean()
    value += 1e-4 * float(across + down) + 1e-3 * float(normalised.norm())
    assert float(attack.distance(images, labels, leak.row(0))) == pytest.approx(value, rel=1e-9)


def test_other_clients_share_no_statistics() -> None:
    one = replace(CASE, network=NETWORKS.spec("resnet18"))
    network = network_of(one)
    leak = leak_of(one, network, secret_of(one, PHOTOS))
    assert leak.buffers == {}
    assert statistics(network, leak.row(0).weights, {}, torch.rand(2, 3, 64, 64).double()) == {}


def test_sharing_statistics_leaves_the_gradient_as_it_is() -> None:
    plain = build(NETWORKS.spec("resnet18"), CASE.shape, 10, stream(CASE, "weights"), torch.float64)
    _, leak = attack_and_leak()
    theirs = leak_of(CASE, plain, secret_of(CASE, PHOTOS))
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(leak.gradients[name], gradient)


@pytest.mark.parametrize("attack", ["gradinversion:total_variation=0.0,norm=0.0", "spectral"])
def test_the_objective_is_zero_but_for_its_priors_at_the_truth(attack: str) -> None:
    attacker, _ = attack_and_leak(replace(CASE, attack=ATTACKS.spec(attack)))
    truth = secret_of(CASE, PHOTOS)
    theirs = attacker.soft if isinstance(attacker, Spectral) else attacker.network
    leak = leak_of(CASE, theirs, truth)
    labels = 1e4 * (F.one_hot(truth.labels[0], 10).double() - 1)
    there = attacker.distance(truth.images[0], labels, leak.row(0))
    assert float(there) == pytest.approx(0, abs=1e-12)
    darker = attacker.distance(0.9 * truth.images[0], labels, leak.row(0))
    assert float(darker) > 1e-3


def test_contrast_that_statistics_tell_is_not_guessed() -> None:
    attack, _ = attack_and_leak(replace(CASE, attack=ATTACKS.spec("spectral")))
    dummies = attack.dummy_images.detach()
    assert torch.equal(attack.matched(dummies), attack.pixels(dummies))


def test_the_loop_is_adam_with_noise_within_the_box() -> None:
    attack, leak = attack_and_leak()
    assert isinstance(attack, GradInversion)
    generator = torch.Generator().manual_seed(stream(CASE, "attack"))
    image = torch.randn(2, 3, 64, 64, generator=generator).double().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.1)
    network = network_of(CASE)
    low, high = -network.mean / network.std, (1 - network.mean) / network.std
    with torch.no_grad():
        attack.look(leak)  # the labels
    for step in range(CASE.steps):
        rate = 0.1 * min(1, (step + 1) * 3 / 50) * (1 + math.cos(math.pi * step / CASE.steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(3):
            pixels = image * network.std + network.mean
            value: Tensor = attack.distance(pixels, attack.dummy_labels[0].detach(), leak.row(0))
            (image.grad,) = torch.autograd.grad(value, image)
            optimizer.step()
            image.data += 0.2 * rate * torch.randn(image.shape, generator=generator)
            image.data.clamp_(low, high)
    torch.testing.assert_close(
        fitted(CASE, leak).dummy_images.detach()[0], image.detach(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("starts", [1, 2])
def test_starts_are_pulled_to_the_mean_of_their_case_and_of_no_other(starts: int) -> None:
    rows = torch.tensor([0.1, 0.3, 0.7, 0.9]).view(4, 1, 1, 1, 1).clone().requires_grad_()
    optimizer = NoisyAdam(rows, (torch.zeros(1), torch.ones(1)), 1e-3, 50, torch.ones(4, dtype=torch.bool))
    optimizer.noise, optimizer.generators, optimizer.starts = 0.0, [torch.Generator()] * 4, starts

    def nothing_to_match() -> Tensor:
        rows.grad = torch.zeros_like(rows)
        return torch.zeros(4)

    optimizer.step(nothing_to_match)
    reached = [0.15, 0.25, 0.75, 0.85] if starts == 2 else [0.1, 0.3, 0.7, 0.9]
    torch.testing.assert_close(rows.detach().flatten(), torch.tensor(reached), rtol=0, atol=5e-3)


def test_starts_that_hold_each_other_all_go_on_to_the_end(attacks: list[Attack]) -> None:
    one = case(attack="gradinversion:iterations=2", steps=20, starts=2)
    ((record, _),) = trial.run([one], PHOTOS, trial.Setup("cpu"), lambda *progress: None)
    assert attacks[0].closures.tolist() == [40, 40]
    assert record.objective == pytest.approx(float(attacks[0].result.objective.min()))
