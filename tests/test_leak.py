"""The gradient against independent truths, and the line between the attacker and the secret."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import dlgbench
from dlgbench.attacks.base import Attack, Reconstruction, Task
from dlgbench.case import Case
from dlgbench.leak import Leak, Secret, Tensors, gradients, squared_distance, squared_norm, stack
from dlgbench.networks import Shape, build
from dlgbench.optim import LBFGS
from dlgbench.prepare import Network, probe
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.stochastic import Dropout
from dlgbench.victims import leak_of, network_of

CASE = Case(
    network=NETWORKS.spec("lenet_dlg"), dataset=DATASETS.spec("photos"), attack=ATTACKS.spec("dlg"),
    defense=DEFENSES.spec("none"), batch=2, resolution=12, preparation="fit", channels=1, classes=5, steps=3,
    dtype="float32", image=0, seed=0,
)  # fmt: skip
HIDDEN = {"victims", "datasets", "records", "metrics", "callbacks", "trial", "case"}
Function = Callable[[Tensor], Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(shape: Shape, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and soft labels."""
    generator = seeded(11)
    images = torch.rand(shape, generator=generator, dtype=dtype)
    return images, torch.randn(shape[0], classes, generator=generator, dtype=dtype).softmax(-1)


def weights_of(network: Network) -> Tensors:
    return dict(network.named_parameters())


def state_of(network: Network) -> Tensors:
    return {name: tensor for name, tensor in network.named_buffers() if name.startswith("body.")}


def lenet5(images: Tensor, weights: list[Tensor]) -> Tensor:
    """The textbook's network: Zhu et al.'s and the study's choice of activation, average pooling."""
    w1, b1, w2, b2, w3, b3, w4, b4, w5, b5 = weights
    hidden = F.avg_pool2d(F.conv2d(images, w1, b1).sigmoid(), 2)
    hidden = F.avg_pool2d(F.conv2d(hidden, w2, b2).sigmoid(), 2).flatten(1)
    return ((hidden @ w3.T + b3).sigmoid() @ w4.T + b4).sigmoid() @ w5.T + b5


def textbook_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over images of -sum(p log q)."""
    log_q = logits - logits.exp().sum(-1, keepdim=True).log()
    return -(labels * log_q).sum(-1).mean()


# The gradient in the weights


@pytest.mark.parametrize("images", [1, 3])
def test_the_gradient_is_the_textbooks(images: int) -> None:
    shape = (images, 1, 32, 32)
    network = build(NETWORKS.spec("lenet5"), shape, 10, 0, torch.float64)
    pixels, labels = batch(shape, 10, torch.float64)
    ours = gradients(network, weights_of(network), {}, pixels, labels)
    leaves = [weight.clone().requires_grad_() for weight in network.parameters()]
    textbook = torch.autograd.grad(textbook_loss(lenet5(pixels, leaves), labels), leaves)
    assert list(ours) == [name for name, _ in network.named_parameters()]
    for mine, theirs in zip(ours.values(), textbook, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)
    assert all(weight.grad is None for weight in network.parameters())


def test_the_gradient_is_that_of_given_weights_not_of_the_networks() -> None:
    network = build(NETWORKS.spec("lenet5"), (1, 1, 32, 32), 10, 0, torch.float64)
    other = build(NETWORKS.spec("lenet5"), (1, 1, 32, 32), 10, 1, torch.float64)
    pixels, labels = batch((1, 1, 32, 32), 10, torch.float64)
    given = gradients(network, weights_of(other), {}, pixels, labels)
    own = gradients(other, weights_of(other), {}, pixels, labels)
    assert all(torch.equal(given[name], own[name]) for name in own)
    assert squared_distance(given, gradients(network, weights_of(network), {}, pixels, labels)) > 0


def test_the_gradient_agrees_with_finite_differences() -> None:
    network = build(NETWORKS.spec("lenet5"), (2, 1, 32, 32), 10, 0, torch.float64)
    pixels, labels = batch((2, 1, 32, 32), 10, torch.float64)
    weights = weights_of(network)
    ours = gradients(network, weights, {}, pixels, labels)
    for name, weight in weights.items():

        def loss(moved: Tensor, name: str = name) -> Tensor:
            values = [moved if key == name else weights[key] for key in weights]
            return textbook_loss(lenet5(pixels, values), labels)

        check_derivative(loss, weight, ours[name], coordinates=3)


def check_derivative(
    function: Function, at: Tensor, gradient: Tensor, coordinates: int, step: float = 1e-5
) -> None:
    """``gradient`` against central differences, at some coordinates and in one random direction."""
    generator = seeded(2)
    directions = [torch.randn(at.shape, generator=generator, dtype=at.dtype)]
    for index in torch.randint(at.numel(), (coordinates,), generator=generator).tolist():
        directions.append(torch.zeros_like(at))
        directions[-1].view(-1)[index] = 1
    for direction in directions:
        truth = (function(at + step * direction) - function(at - step * direction)) / (2 * step)
        scale = float(gradient.abs().max() * direction.norm())
        rounding = 5e-15 * float(function(at)) / step
        assert scale > 100 * rounding
        error = float((gradient * direction).sum() - truth)
        assert abs(error) < 1e-5 * abs(float(truth)) + 1e-6 * scale + rounding


@pytest.mark.parametrize(
    ("text", "shape", "step"),
    [
        ("lenet_dlg", (2, 3, 16, 16), 1e-5),
        ("lenet_dlg:activation=gelu", (1, 1, 9, 9), 1e-5),
        ("resnet18", (2, 3, 64, 64), 1e-7),
        ("resnet18:activation=silu,batchnorm=eval", (1, 3, 32, 32), 1e-7),
    ],
)
def test_the_distances_gradient_agrees_with_finite_differences(text: str, shape: Shape, step: float) -> None:
    """Second derivatives of the loss, through batch norm in train mode too.

    Max pooling makes the distance jump wherever another pixel becomes a maximum: hence the tiny step.
    """
    network = build(NETWORKS.spec(text), shape, 5, 0, torch.float64)
    pixels, labels = batch(shape, 5, torch.float64)
    weights, state = weights_of(network), state_of(network)
    target = gradients(network, weights, state, pixels.flip(-1), labels.flip(-1))

    def distance(images: Tensor, labels: Tensor) -> Tensor:
        return squared_distance(gradients(network, weights, state, images, labels), target)

    leaves = pixels.clone().requires_grad_(), labels.clone().requires_grad_()
    in_images, in_labels = torch.autograd.grad(distance(*leaves), leaves)
    check_derivative(lambda moved: distance(moved, labels), pixels, in_images, coordinates=1, step=step)
    check_derivative(lambda moved: distance(pixels, moved), labels, in_labels, coordinates=0, step=step)


def test_inceptions_loss_is_torchvisions() -> None:
    """Main head + 0.4 auxiliary head, as in references/classification/train.py, and its gradient."""
    shape = (2, 3, 299, 299)
    spec = NETWORKS.spec("inception_v3:activation=relu,dropout=off")
    network = build(spec, shape, 10, 0, torch.float64)
    pixels, targets = torch.rand(shape, generator=seeded(0)).double(), torch.tensor([3, 8])
    with torch.random.fork_rng(devices=[]):
        model = torchvision.models.inception_v3(weights=None, num_classes=10, init_weights=False)
    model.load_state_dict(network.body.state_dict(), strict=False)
    model.double().train().dropout.p = 0.0
    main, auxiliary = model((pixels - network.mean) / network.std)
    loss = nn.CrossEntropyLoss()(main, targets) + 0.4 * nn.CrossEntropyLoss()(auxiliary, targets)
    loss.backward()
    labels = F.one_hot(targets, 10).double()
    torch.testing.assert_close(network.loss(network(pixels), labels), loss.detach(), rtol=1e-12, atol=0)
    ours = gradients(network, weights_of(network), {}, pixels, labels)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        worst = (ours[f"body.{name}"] - parameter.grad).norm() / parameter.grad.norm()
        assert worst < 1e-9, name


@pytest.mark.parametrize("heads", [(1.0,), (1.0, 0.4), (0.0, 2.0)])
def test_the_loss_is_the_weighted_sum_over_heads(heads: tuple[float, ...]) -> None:
    network = Network(nn.Identity(), heads=heads)
    logits = tuple(torch.randn(3, 4, generator=seeded(i)) for i in range(len(heads)))
    labels = torch.randn(3, 4, generator=seeded(9)).softmax(-1)
    truth = sum(w * textbook_loss(head, labels) for w, head in zip(heads, logits, strict=True))
    torch.testing.assert_close(network.loss(logits, labels), truth)


def test_distance_and_norm_are_those_of_the_joined_vector() -> None:
    ours, theirs = (
        {"a": torch.randn(2, 3, generator=g), "b": torch.randn(5, generator=g)}
        for g in (seeded(0), seeded(1))
    )
    u, v = (torch.cat([part.flatten() for part in (x["a"], x["b"])]) for x in (ours, theirs))
    torch.testing.assert_close(squared_distance(ours, theirs), (u - v) @ (u - v))
    torch.testing.assert_close(squared_norm(ours), u @ u)
    assert squared_distance(ours, ours) == 0


# What the client shares


def dropout_network(known: bool) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Flatten(), nn.Linear(144, 60), nn.Sigmoid(), Dropout(0.5), nn.Linear(60, 5))
    network = Network(body, mask_known=known).requires_grad_(False)
    probe(network, CASE.shape)
    return network


def secret(seed: int = 7) -> Secret:
    images = torch.rand((1, *CASE.shape), generator=seeded(seed))
    return Secret(images, torch.randint(5, (1, 2), generator=seeded(seed)))


def one_hot(truth: Secret) -> Tensor:
    return torch.eye(5)[truth.labels[0]]


def test_a_known_mask_is_the_victims() -> None:
    network, truth = dropout_network(known=True), secret()
    leak = leak_of(CASE, network, truth)
    mask = leak.buffers["body.3.mask"]
    assert (mask.shape, set(mask.flatten().tolist())) == ((1, 2, 60), {0.0, 2.0})
    row = leak.row(0)
    again = gradients(network, row.weights, row.buffers, truth.images[0], one_hot(truth))
    assert all(torch.equal(again[name], row.gradients[name]) for name in again)
    dropped = (mask[0] == 0).all(0)
    assert dropped.any()
    assert not row.gradients["body.4.weight"][:, dropped].any()
    assert row.gradients["body.4.weight"][:, ~dropped].any(0).all()


def test_a_fresh_mask_stays_with_the_victim() -> None:
    truth = secret()
    fresh, known = (leak_of(CASE, dropout_network(known), truth) for known in (False, True))
    assert not fresh.buffers
    assert set(known.buffers) == {"body.3.mask"}
    assert all(torch.equal(fresh.gradients[name], known.gradients[name]) for name in known.gradients)


@pytest.mark.parametrize("purpose", ["seed", "image"])
def test_another_case_has_another_mask(purpose: str) -> None:
    case = replace(CASE, seed=1) if purpose == "seed" else replace(CASE, image=1)
    masks = [leak_of(c, dropout_network(True), secret()).buffers["body.3.mask"] for c in (CASE, case)]
    assert not torch.equal(*masks)


def test_the_attacker_draws_a_mask_only_where_none_is_known() -> None:
    for known in (False, True):
        network = dropout_network(known)
        leak = leak_of(CASE, network, secret())
        attack = attack_on(network)
        dummies = attack.dummy_images.detach(), attack.dummy_labels.detach()
        first, again = (attack.evaluate(*dummies, leak).objective for _ in range(2))
        assert torch.equal(first, again) == known


def test_eval_mode_shares_the_running_statistics_and_train_mode_none() -> None:
    for mode in ("train", "eval"):
        case = replace(CASE, network=NETWORKS.spec(f"resnet18:batchnorm={mode}"), channels=3, resolution=64)
        network = network_of(case)
        truth = Secret(torch.rand((1, *case.shape), generator=seeded(0)), torch.tensor([[1, 4]]))
        leak = leak_of(case, network, truth)
        assert bool(leak.buffers) == (mode == "eval")
        assert all(name.startswith("body.") for name in leak.buffers)
        assert set(leak.weights) == set(leak.gradients) == set(dict(network.named_parameters()))


def test_the_defense_is_applied() -> None:
    truth, network = secret(), network_of(CASE)
    plain, noisy = (
        leak_of(replace(CASE, defense=DEFENSES.spec(text)), network, truth).gradients
        for text in ("none", "noise:std=0.3")
    )
    noise = torch.cat([(noisy[name] - plain[name]).flatten() for name in plain])
    assert noise.std().item() == pytest.approx(0.3, rel=0.05)
    bare = gradients(network, weights_of(network), {}, truth.images[0], one_hot(truth))
    assert all(torch.equal(plain[name][0], bare[name]) for name in bare)


def test_a_row_is_a_leak_without_the_case_dimension() -> None:
    one, other = (leak_of(CASE, dropout_network(True), secret(seed)) for seed in (1, 2))
    both = Leak(
        *({name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(one, other, strict=True))
    )
    for case, leak in enumerate((one, other)):
        for ours, theirs in zip(both.row(case), leak, strict=True):
            assert all(torch.equal(ours[name], theirs[name][0]) for name in theirs)


def test_rows_are_replaced_in_what_they_hold_and_the_leak_stays_as_it_was() -> None:
    one, other = (leak_of(CASE, dropout_network(True), secret(seed)) for seed in (1, 2))
    both = stack([one, other])
    name = next(iter(both.gradients))
    new = both.replaced({1: Leak({}, {}, {name: torch.zeros_like(other.gradients[name][0])})})
    assert torch.equal(new.gradients[name][0], one.gradients[name][0])
    assert not new.gradients[name][1].any()
    assert torch.equal(both.gradients[name][1], other.gradients[name][0])
    assert list(new.gradients) == list(both.gradients)
    rest = [n for n in both.gradients if n != name]
    assert all(torch.equal(new.gradients[n], both.gradients[n]) for n in rest)


# What the attacker cannot reach


def attack_on(network: Network) -> Attack:
    attack: Attack = ATTACKS.make(CASE.attack, network, Task(*CASE.shape, CASE.classes, [seeded(3)]))
    return attack


def reconstruct(network: Network, leak: Leak) -> Reconstruction:
    """The attack in a bare loop."""
    attack = attack_on(network)
    optimizer = attack.configure_optimizers()
    assert isinstance(optimizer, LBFGS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = attack.training_step(leak, 0)
        attack.backward(loss)
        return loss

    for step in range(CASE.steps):
        attack.on_train_batch_start(leak, step)
        optimizer.step(closure)
    attack.on_train_end()
    return attack.result


def test_the_secret_cannot_be_reached_once_the_leak_is_taken() -> None:
    found = []
    for spoil in (False, True):
        network, truth = network_of(CASE), secret()
        leak = leak_of(CASE, network, truth)
        if spoil:
            truth.images.copy_(truth.images.flip(1, -1).roll(3))
            truth.labels.add_(1).remainder_(CASE.classes)
        found.append(reconstruct(network, leak))
    assert all(map(torch.equal, *found))
    start = attack_on(network_of(CASE))
    assert not torch.equal(found[0].images, start.pixels(start.dummy_images))


def test_a_leak_holds_no_tensor_of_the_secret() -> None:
    truth = secret()
    leak = leak_of(CASE, network_of(CASE), truth)
    own = {tensor.untyped_storage().data_ptr() for tensor in truth}
    shared = {tensor.untyped_storage().data_ptr() for part in leak for tensor in part.values()}
    assert not own & shared
    assert not any(tensor.requires_grad or tensor.grad_fn for part in leak for tensor in part.values())


def imported(file: Path) -> Iterator[str]:
    """The package's modules, and the names in them, that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "write absolute imports: relative ones are not read here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reachable(start: Path, root: Path) -> set[str]:
    """The package's modules that an import of ``start`` leads to."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in imported(waiting.pop()):
            parts = name.removeprefix("dlgbench.").split(".")
            places = [root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
            files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
            for file in files if name.startswith("dlgbench.") else []:
                module = str(file.relative_to(root))
                if file.exists() and module not in seen:
                    seen.add(module)
                    waiting.append(file)
    return seen


ROOT = Path(dlgbench.__file__).parent


@pytest.mark.parametrize("file", sorted((ROOT / "attacks").glob("*.py")), ids=lambda file: str(file.stem))
def test_an_attack_imports_nothing_that_knows_the_secret(file: Path) -> None:
    modules = reachable(file, ROOT)
    assert file.stem == "__init__" or "leak.py" in modules
    assert not modules & {f"{name}.py" for name in HIDDEN}
    known = {name for name in modules if name.startswith("defenses/")}
    assert known <= {"defenses/__init__.py", "defenses/base.py"}  # what is public of any of them


def test_forbidden_imports_would_be_seen() -> None:
    assert {"victims.py", "datasets.py", "records.py"} <= reachable(ROOT / "trial.py", ROOT)
    assert "networks.py" in reachable(ROOT / "victims.py", ROOT)  # from dlgbench import datasets, networks


@pytest.mark.parametrize("name", ["dlg", "adaptive"])
def test_importing_an_attack_loads_nothing_that_knows_the_secret(name: str) -> None:
    code = (
        f"import sys, dlgbench.attacks.{name}\n"
        f"assert not {{f'dlgbench.{{name}}' for name in {sorted(HIDDEN)}}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
