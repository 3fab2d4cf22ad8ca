"""Defences that need more than a gradient, against bare loops and known answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm, uniform
from torch import Tensor

from dlgbench.defenses import Defense, GradientDefense, aggregation, encryption, make, soteria
from dlgbench.defenses.lightning import DefendGradients
from dlgbench.errors import Unsuitable, UsageError
from dlgbench.leak import Client, Tensors
from dlgbench.networks import build
from dlgbench.registry import DEFENSES, NETWORKS

BATCH, CLASSES = 9, 10
OTHERS = [name for name in DEFENSES.entries if not isinstance(make(name), GradientDefense)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def client(batch: int = BATCH, defense: str = "none") -> tuple[Client, Tensor, Tensor]:
    """A client with the LeNet of DLG in float64 as ``defense`` has it, random images and one-hot labels."""
    network = build(
        NETWORKS.spec("lenet_dlg"), (batch, 1, 16, 16), CLASSES, 3, torch.float64, make(defense).protect
    )
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    images = torch.rand(batch, 1, 16, 16, generator=seeded(1), dtype=torch.float64)
    labels = F.one_hot(torch.randint(CLASSES, (batch,), generator=seeded(2)), CLASSES).double()
    return Client(network, weights, dict(network.named_buffers())), images, labels


def by_autograd(one: Client, images: Tensor, labels: Tensor, weights: Tensors) -> Tensors:
    """The gradient by torch's own backward pass."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    logits = torch.func.functional_call(one.network, {**leaves, **one.buffers}, (images,))[0]
    loss = -(labels * logits.log_softmax(1)).sum(1).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def close(ours: Tensors, theirs: Tensors, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    assert list(ours) == list(theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", DEFENSES.entries)
def test_every_update_keeps_names_shapes_and_dtypes_and_leaves_its_data_alone(name: str) -> None:
    one, images, labels = client(defense=name)
    before = [tensor.clone() for tensor in (images, labels, *one.weights.values())]
    shared = make(name).update(one, images, labels, seeded())
    assert {k: (g.shape, g.dtype) for k, g in shared.items()} == {
        k: (w.shape, w.dtype) for k, w in one.weights.items()
    }
    assert all(gradient.isfinite().all() for gradient in shared.values())
    after = (images, labels, *one.weights.values())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", [name for name in DEFENSES.entries if name != "ckks"])
def test_an_update_is_determined_by_its_generator(name: str) -> None:
    one, images, labels = client(defense=name)
    state = torch.get_rng_state()
    first, again = (make(name).update(one, images, labels, seeded(4)) for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["none", "prune", "noise", "sign"])
def test_a_function_of_the_gradient_is_applied_to_the_gradient(name: str) -> None:
    one, images, labels = client()
    defense = make(name)
    private = by_autograd(one, images, labels, one.weights)
    close(defense.update(one, images, labels, seeded(4)), defense(private, seeded(4)))
    expected = defense.expected(one, images, labels, private)
    assert isinstance(defense, GradientDefense)
    close(expected, defense.foreseen(private, private))


@pytest.mark.parametrize("name", OTHERS)
def test_what_needs_data_says_so(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected the client's data.*update"):
        make(name)([torch.ones(3)], seeded())
    with pytest.raises(UsageError, match=r"whole gradient.*update"):
        DefendGradients(name)


@pytest.mark.parametrize("name", OTHERS)
def test_a_gradient_that_is_not_finite_is_refused(name: str) -> None:
    one, images, labels = client(defense=name)
    images[0, 0, 3, 3] = torch.nan
    with pytest.raises(UsageError, match="finite"):
        make(name).update(one, images, labels, seeded())


@pytest.mark.parametrize("name", ["none", "dpsgd:multiplier=1e-9", "local", "secagg", "ckks", "soteria"])
def test_what_leaves_nothing_to_chance_is_foreseen(name: str) -> None:
    one, images, labels = client()
    defense = make(name)
    shared = defense.update(one, images, labels, seeded())
    close(defense.expected(one, images, labels, shared), shared, rtol=0, atol=2e-6)


def clipped_mean(one: Client, images: Tensor, labels: Tensor, bound: float) -> Tensors:
    """The examples one by one."""
    total = {name: torch.zeros_like(weight) for name, weight in one.weights.items()}
    for image, label in zip(images, labels, strict=True):
        gradient = by_autograd(one, image[None], label[None], one.weights)
        length = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        for name, g in gradient.items():
            total[name] += g * min(1, bound / length) / len(images)
    return total


@pytest.mark.parametrize("bound", [0.1, 2.0, 1e6])
def test_dpsgd_clips_every_example(bound: float) -> None:
    one, images, labels = client()
    defense = make(f"dpsgd:multiplier=1e-12,bound={bound}")
    close(
        defense.update(one, images, labels, seeded()),
        clipped_mean(one, images, labels, bound),
        atol=1e-11 * bound,
    )


@pytest.mark.parametrize(("multiplier", "bound"), [(1.0, 1.0), (0.5, 3.0)])
def test_the_noise_of_dpsgd_is_its_multiple_of_the_bound(multiplier: float, bound: float) -> None:
    one, images, labels = client()
    shared = make(f"dpsgd:multiplier={multiplier},bound={bound}").update(one, images, labels, seeded())
    clean = clipped_mean(one, images, labels, bound)
    noise = torch.cat([(shared[name] - clean[name]).flatten() for name in clean]).numpy()
    deviation = multiplier * bound / BATCH
    assert kstest(noise, norm(scale=deviation).cdf).pvalue > 1e-3
    assert kstest(noise, norm(scale=1.15 * deviation).cdf).pvalue < 1e-3
    doubt = make(f"dpsgd:multiplier={multiplier},bound={bound}").doubt(shared, BATCH)
    assert all(float(value) == pytest.approx(deviation) for value in doubt.values())


def analytic_gaussian(sigma: float, delta: float) -> float:
    """The least ε of a Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, theorem 8)."""
    cdf, low, high = NormalDist().cdf, 0.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        far = cdf(-1 / (2 * sigma) - middle * sigma)
        loss = cdf(1 / (2 * sigma) - middle * sigma) - (math.exp(middle + math.log(far)) if far else 0)
        low, high = (middle, high) if loss > delta else (low, middle)
    return high


@pytest.mark.filterwarnings("ignore")  # of Opacus
@pytest.mark.parametrize(("multiplier", "steps"), [(1.0, 1), (4.0, 1), (8.0, 16), (0.6, 1)])
def test_epsilon_is_that_of_the_analytic_gaussian(multiplier: float, steps: int) -> None:
    epsilon = make(f"dpsgd:multiplier={multiplier}").epsilon(1.0, steps, 1e-5)
    assert epsilon == pytest.approx(analytic_gaussian(multiplier / math.sqrt(steps), 1e-5), abs=0.02)


@pytest.mark.filterwarnings("ignore")
def test_less_noise_is_less_private_up_to_nothing() -> None:
    found = [make(f"dpsgd:multiplier={m}").epsilon(0.02, 100, 1e-5) for m in (0.05, 0.3, 1, 4)]
    assert all(a is not None and b is not None and a > b for a, b in pairwise(found))
    assert make("noise").epsilon(0.02, 100, 1e-5) is None


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.1), (4, 0.3)])
def test_local_steps_are_gradient_descent(steps: int, rate: float) -> None:
    one, images, labels = client()
    weights = dict(one.weights)
    for _ in range(steps):
        gradient = by_autograd(one, images, labels, weights)
        weights = {name: weight - rate * gradient[name] for name, weight in weights.items()}
    moved = {name: (one.weights[name] - weight) / (steps * rate) for name, weight in weights.items()}
    shared = make(f"local:steps={steps},rate={rate}").update(one, images, labels, seeded())
    close(shared, moved, rtol=1e-7)


def jacobians(one: Client, images: Tensor) -> Iterator[Tensor]:
    for image in images:
        leaf = image[None].clone().requires_grad_()
        features = one.features(leaf)[0]
        yield torch.stack([torch.autograd.grad(f, leaf, retain_graph=True)[0].norm() for f in features])


def test_soteria_leaves_out_the_features_that_tell_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soteria, "PROBES", 1000)
    one, images, labels = client(2)
    private = by_autograd(one, images, labels, one.weights)
    shared = make("soteria:share=0.3").update(one, images, labels, seeded())
    name = f"{one.head}.weight"
    left_out = (shared[name] == 0).all(0)
    steepness = torch.stack(list(jacobians(one, images)))
    telling = (one.features(images).abs() / steepness).nan_to_num(posinf=0).sum(0)
    wanted = telling >= telling.sort(descending=True).values[int(left_out.sum()) - 1]
    assert int(left_out.sum()) == round(0.3 * len(telling))
    assert int((left_out & wanted).sum()) > 0.93 * int(left_out.sum())
    close({**shared, name: shared[name][:, ~left_out]}, {**private, name: private[name][:, ~left_out]})


def test_mixup_is_the_gradient_of_mixtures() -> None:
    one, images, labels = client()
    shared = make("mixup").update(one, images, labels, seeded(7))
    draws = seeded(7)
    share = float(torch.rand((), generator=draws))
    order = torch.randperm(BATCH, generator=draws)
    mixed = [share * part + (1 - share) * part[order] for part in (images, labels)]
    close(shared, by_autograd(one, mixed[0], mixed[1], one.weights))
    assert 0 < share < 1
    assert order.tolist() != list(range(BATCH))


@pytest.mark.parametrize("dropped", [0, 1, 5])
@pytest.mark.parametrize("clients", [2, 6, 9])
def test_secure_aggregation_is_the_gradient_of_all_who_are_there(clients: int, dropped: int) -> None:
    if dropped >= clients:
        with pytest.raises(UsageError, match="fewer clients that drop out"):
            make(f"secagg:clients={clients},dropped={dropped}")
        return
    one, images, labels = client()
    defense = make(f"secagg:clients={clients},dropped={dropped}")
    shared = defense.update(one, images, labels, seeded())
    there = len(torch.cat(images.tensor_split(clients)[: clients - dropped]))
    private = by_autograd(one, images[:there], labels[:there], one.weights)
    error = torch.cat([(shared[name] - private[name]).flatten() for name in private])
    doubt = float(defense.doubt(shared, BATCH)[one.head + ".bias"])
    assert 0.5 * doubt < float(error.square().mean().sqrt()) <= 1.5 * doubt


values = st.lists(st.floats(-200, 200), min_size=1, max_size=6)


@given(st.lists(values, min_size=2, max_size=6), st.data())
@settings(deadline=None)
def test_masks_cancel_bit_for_bit(rows: list[list[float]], data: st.DataObject) -> None:
    length = min(map(len, rows))
    vectors = [torch.tensor(row[:length], dtype=torch.float64) for row in rows]
    present = data.draw(st.integers(1, len(rows)))
    masks = aggregation.pairwise(len(rows), vectors[0], seeded(data.draw(st.integers(0, 99))))
    encoded = [aggregation.encode(vector, len(rows)) for vector in vectors]
    sent = [aggregation.masked(one, index, masks) for index, one in enumerate(encoded[:present])]
    total = aggregation.unmasked(torch.stack(sent).sum(0), present, masks)
    bare = torch.stack(encoded[:present]).sum(0) % aggregation.MODULUS
    assert torch.equal(total, bare)
    wanted = torch.stack(vectors[:present]).sum(0)
    torch.testing.assert_close(aggregation.decode(total), wanted, rtol=0, atol=len(rows) * aggregation.UNIT)


def test_one_client_alone_tells_nothing() -> None:
    zeros = torch.zeros(20_000)
    masks = aggregation.pairwise(3, zeros, seeded())
    sent = aggregation.masked(aggregation.encode(zeros + 7.5, 3), 1, masks).double() / aggregation.MODULUS
    assert kstest(sent.numpy(), uniform.cdf).pvalue > 1e-3


def test_sums_out_of_range_are_clamped_instead_of_wrapped() -> None:
    far = torch.tensor([1e9, -1e9, 1.0])
    total = sum(aggregation.encode(far, 4) for _ in range(4))
    assert isinstance(total, Tensor)
    assert aggregation.decode(total).sign().tolist() == [1, -1, 1]


def test_a_ciphertext_adds_up_and_tells_nothing() -> None:
    one, images, labels = client()
    defense = make("ckks:clients=3")
    shared = defense.update(one, images, labels, seeded())
    close(shared, by_autograd(one, images, labels, one.weights), rtol=0, atol=1e-6)
    seen = defense.observed(one, images, labels, seeded())
    assert not any(gradient.any() for gradient in seen.values())
    assert seen.keys() == shared.keys()
    close(make("ckks:key=attacker").observed(one, images, labels, seeded()), shared, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["noise:std=2", "laplace:scale=2"])
def test_rounds_are_averaged_and_each_has_noise_of_its_own(name: str) -> None:
    one, images, labels = client()
    private = by_autograd(one, images, labels, one.weights)
    many = make(f"{name},rounds=25")
    seen = many.observed(one, images, labels, seeded())
    noise = torch.cat([(seen[key] - private[key]).flatten() for key in private])
    doubt = float(many.doubt(seen, BATCH)[one.head + ".bias"])
    assert doubt == pytest.approx(float(make(name).doubt(seen, BATCH)[one.head + ".bias"]) / 5)
    assert float(noise.std()) == pytest.approx(doubt, rel=0.05)  # of 11,000 samples
    once = make(name)
    close(once.observed(one, images, labels, seeded(4)), once.update(one, images, labels, seeded(4)))
    close(many.update(one, images, labels, seeded(4)), once.update(one, images, labels, seeded(4)))


def test_dropout_leaves_out_features_of_every_image() -> None:
    one, images, labels = client()
    features = one.weights[f"{one.head}.weight"].shape[1]
    kept = torch.rand(BATCH, features, generator=seeded(4), dtype=torch.float64) >= 0.3
    head = one.network.get_submodule(one.head)
    hook = head.register_forward_pre_hook(lambda _, given: (given[0] * kept / 0.7,))
    private = by_autograd(one, images, labels, one.weights)
    hook.remove()
    close(make("dropout:share=0.3").update(one, images, labels, seeded(4)), private)


def with_precode(batch: int, draws: int) -> tuple[Client, Tensor, Tensor]:
    """A client whose network has a bottleneck, with noise of its own."""
    plain, images, labels = client(batch)
    one, _, _ = client(batch, "precode:units=5")
    network, weights = one.network, one.weights
    trunk = [name for name in plain.weights if not name.startswith(plain.head)]
    assert all(torch.equal(weights[name], plain.weights[name]) for name in trunk)
    buffers = {**dict(network.named_buffers()), **network.draw_masks(batch, seeded(draws))}
    return Client(network, weights, buffers), images, labels


def test_precode_without_its_network_is_refused() -> None:
    one, images, labels = client()
    with pytest.raises(UsageError, match="expected a network with a bottleneck"):
        make("precode").update(one, images, labels, seeded())


@pytest.mark.parametrize("name", DEFENSES.entries)
def test_the_registry_says_which_defences_change_the_network(name: str) -> None:
    before, after = (client(defense=text)[0].weights for text in ("none", name))
    assert (before.keys() != after.keys()) == ("rebuilds" in DEFENSES.entry(name).facts)


@pytest.mark.parametrize("network", ["lenet5", "resnet18", "densenet121"])
def test_every_network_with_one_head_takes_a_bottleneck(network: str) -> None:
    shape = (2, 3, 64, 64)
    with torch.device("meta"):
        found = make("precode").protect(NETWORKS.make(NETWORKS.spec(network), shape, CLASSES), shape)
        logits, code = found(torch.empty(shape))
    assert (logits.shape, code.shape) == ((2, CLASSES), (2, 512))
    assert found.get_parameter(f"{found.head}.weight").shape[0] == CLASSES
    (mask,) = found.draw_masks(3, seeded()).values()
    assert mask.shape == (3, 256)


@pytest.mark.parametrize("name", ["dpsgd", "secagg", "ckks", "dropout"])
def test_batches_for_which_was_drawn_as_a_whole_are_not_taken_apart(name: str) -> None:
    shape = (2, 3, 299, 299)
    with torch.device("meta"):
        network = NETWORKS.make(NETWORKS.spec("inception_v3"), shape, CLASSES)
    with pytest.raises(Unsuitable, match="expected a batch of 1"):
        make(name).protect(network, shape)
    assert make(name).protect(network, (1, *shape[1:])) is network


def test_precode_shares_the_gradient_of_its_loss() -> None:
    one, images, labels = with_precode(3, 7)
    leaves = {name: weight.clone().requires_grad_() for name, weight in one.weights.items()}
    place = one.head.removesuffix(".head")
    hidden = images
    for index in (0, 2, 4):
        weight, bias = (leaves[f"body.{index}.{part}"] for part in ("weight", "bias"))
        hidden = F.conv2d(hidden, weight, bias, stride=1 if index == 4 else 2, padding=2).sigmoid()
    code = F.linear(hidden.flatten(1), leaves[f"{place}.encoder.weight"], leaves[f"{place}.encoder.bias"])
    sample = code[:, :5] + (code[:, 5:] / 2).exp() * one.buffers[f"{place}.sample.mask"]
    decoded = F.linear(sample, leaves[f"{place}.decoder.weight"], leaves[f"{place}.decoder.bias"])
    logits = F.linear(decoded, leaves[f"{place}.head.weight"], leaves[f"{place}.head.bias"])
    far = (code[:, :5] ** 2 + code[:, 5:].exp() - code[:, 5:] - 1).sum(1).mean() / 2
    loss = F.cross_entropy(logits, labels) + 1e-3 * far
    truth = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    close(make("precode").update(one, images, labels, seeded()), truth)


def test_what_lies_before_a_bottleneck_is_foreseen_without_its_noise_and_the_label() -> None:
    one, images, labels = with_precode(1, 7)
    other, _, _ = with_precode(1, 8)
    defense = make("precode:units=5")
    shared = defense.update(one, images, labels, seeded())
    assert not torch.equal(shared["body.0.weight"], other.gradient(images, labels)["body.0.weight"])
    close(defense.expected(other, images, labels.flip(1), shared), shared)


def test_what_dropout_left_out_of_one_image_is_seen() -> None:
    one, images, labels = client(1)
    defense = make("dropout")
    shared = defense.update(one, images, labels, seeded())
    close(defense.expected(one, images, labels, shared), shared)
    dropped = (shared[f"{one.head}.weight"] == 0).all(0).double().mean()
    assert 0.3 < dropped < 0.7


def test_the_size_of_a_ciphertext_is_that_of_its_bytes() -> None:
    numbers = torch.zeros(2 * encryption.SLOTS + 1)
    sizes = [len(part.serialize()) for part in encryption.encrypted(numbers)]
    assert len(sizes) == 3
    assert make("ckks").size({"all": numbers}) == pytest.approx(3 * sizes[0], rel=0.01)


def sizes() -> list[tuple[str, int]]:
    return [("none", 404), ("fp16", 202), ("bf16", 202), ("int8", 105), ("sign", 13), ("noise", 404)]


@pytest.mark.parametrize(("name", "size"), sizes())
def test_bytes_are_counted(name: str, size: int) -> None:
    (gradient,) = make(name)([torch.arange(1.0, 102)], seeded())
    assert make(name).size({"weight": gradient}) == size


def test_pruned_gradients_are_sent_with_their_places() -> None:
    few, many = torch.zeros(1600), torch.zeros(1600)
    few[:10], many[:800] = 1, 1
    assert make("prune").size({"few": few}) == 10 * (4 + 4)
    assert make("topk").size({"many": many}) == 800 * 4 + 1600 // 8
    assert make("prune").size({"few": few, "many": many}) == 80 + 3400


@pytest.mark.parametrize("text", [
    "dpsgd:multiplier=0", "dpsgd:bound=-1", "local:steps=0", "local:rate=0", "secagg:clients=0",
    "secagg:clients=3,dropped=3", "secagg:dropped=-1", "ckks:key=nobody", "soteria:share=1",
    "soteria:share=-0.1", "ckks:clients=0", "dropout:share=1", "noise:rounds=0", "precode:units=0",
])  # fmt: skip
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        make(text)


def defense_of(text: str) -> Defense:
    return make(text)


@pytest.mark.parametrize(("text", "package", "trains"), [("dpsgd", "dp", True), ("ckks", "he", False)])
def test_what_is_not_installed_is_named_with_the_remedy(
    text: str, package: str, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert defense_of(text).refusal(trains) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = defense_of(text).refusal(trains)
    assert told is not None
    assert f'pip install "dlgbench[{package}]"' in told
    if text == "dpsgd":
        assert defense_of(text).refusal(False) is None
