"""Labels inferred from gradients, against the labels that made them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dlgbench import masks, networks
from dlgbench.defenses import make
from dlgbench.labels import factor, head, logits, recover
from dlgbench.leak import Leak, Tensors, gradients
from dlgbench.prepare import Network, replace_activation
from dlgbench.registry import NETWORKS
from dlgbench.victims import network_of, secret_of

from .clients import PHOTOS, case, leaked

SIDES = {"resnet18": 64, "densenet121": 64, "mobilenet_v2": 64, "inception_v3": 299}
CLASSES = 20


def recovered(
    text: str, truth: list[int], bias: bool = True, seed: int = 0, defense: str = "none"
) -> list[int]:
    """What the gradient of random images with the labels ``truth`` tells."""
    network, leak, images = client(text, truth, bias, seed, defense)
    return recover(network, leak, torch.full_like(images, 0.5)).tolist()


def client(
    text: str, truth: list[int], bias: bool = True, seed: int = 0, defense: str = "none"
) -> tuple[Network, Leak, Tensor]:
    """A network, what leaks of random images with the labels ``truth``, and the images."""
    side = SIDES.get(text.partition(":")[0], 32)
    images = torch.rand(len(truth), 3, side, side, generator=torch.Generator().manual_seed(seed))
    network = networks.build(NETWORKS.spec(text), (len(truth), 3, side, side), CLASSES, seed)
    if not bias:
        remove_bias(network)
    weights: Tensors = dict(network.named_parameters())
    buffers = {name: buffer for name, buffer in network.named_buffers() if name.startswith("body.")}
    shared = gradients(network, weights, buffers, images, one_hot(torch.tensor(truth)))
    shared = make(defense)(shared, torch.Generator().manual_seed(seed))
    return network, Leak(weights, buffers, shared), images


def remove_bias(network: Network) -> None:
    head = network.get_submodule(network.head)
    assert isinstance(head, nn.Linear)
    head.bias = None  # type: ignore[assignment]


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, CLASSES).float()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("name", ["lenet5", "lenet_dlg", "resnet18", "densenet121", "mobilenet_v2"])
def test_one_images_label_is_always_found(name: str, activation: str, bias: bool) -> None:
    for seed in range(3):
        assert recovered(f"{name}:activation={activation}", [7 * seed], bias, seed) == [7 * seed]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [3, 20])
def test_one_images_label_is_found_of_features_that_are_no_nearer_to_greys(classes: int, bias: bool) -> None:
    """Normalised ones, as before the head of a transformer: iDLG needs features that are not negative."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        head, images = nn.Linear(48, classes, bias), torch.rand(1, 3, 4, 4, generator=generator)
        for weight in head.parameters():
            nn.init.normal_(weight, generator=generator)
        body = replace_activation(nn.Sequential(nn.Flatten(), nn.LayerNorm(48, bias=False), head), "relu")
        network, truth = Network(body), torch.tensor([seed % classes])
        weights = {name: weight.detach() for name, weight in network.named_parameters()}
        shared = gradients(network, weights, {}, images, F.one_hot(truth, classes).float())
        assert recover(network, Leak(weights, {}, shared), torch.full_like(images, 0.5)) == truth


def test_a_bias_of_which_no_gradient_is_shared_still_counts() -> None:
    """The prediction is then that of grey images, as the network itself gives it."""
    network = networks.build(NETWORKS.spec("lenet_dlg"), (2, 3, 32, 32), CLASSES, 0)
    weights: Tensors = dict(network.named_parameters())
    grey, bias = torch.full((2, 3, 32, 32), 0.5), f"{network.head}.bias"
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shared = gradients(network, weights, {}, images, one_hot(torch.tensor([3, 17])))
    leak = Leak(weights, {bias: weights.pop(bias)}, {name: shared[name] for name in weights})
    torch.testing.assert_close(head(network, leak, grey)[0], network(grey)[0][0].softmax(0))


def test_of_several_heads_the_first_tells() -> None:
    assert recovered("inception_v3", [3, 17]) == [3, 17]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("truth", [[5, 5], [0, 3, 3, 3], [1, 2, 4, 8, 8, 16, 16, 19], [9] * 8])
@pytest.mark.parametrize("name", ["lenet5", "lenet_dlg", "resnet18"])
def test_duplicates_are_counted(name: str, truth: list[int], bias: bool) -> None:
    """Rivals subtract at a stale index and repeat one label (B3 of the field's defects)."""
    assert recovered(name, truth, bias) == truth


@pytest.mark.parametrize("defense", ["prune:share=0.99", "topk:share=0.99"])
@pytest.mark.parametrize("name", ["lenet5", "lenet_dlg", "resnet18"])
def test_a_label_is_found_where_little_is_shared(name: str, defense: str) -> None:
    """Of 20 entries of the head's bias, a hundredth is none."""
    for seed in range(3):
        assert recovered(name, [7 * seed], seed=seed, defense=defense) == [7 * seed]


@pytest.mark.parametrize("defense", ["clip:bound=0.001", "clip:bound=1"])
@pytest.mark.parametrize("truth", [[5, 5], [0, 3, 3, 3], [1, 2, 4, 8, 8, 16, 16, 19], [9] * 8])
@pytest.mark.parametrize("name", ["lenet5", "lenet_dlg", "resnet18"])
def test_duplicates_are_counted_in_a_clipped_gradient(name: str, truth: list[int], defense: str) -> None:
    assert recovered(name, truth, defense=defense) == truth


@pytest.mark.parametrize("by", [1e-4, 0.1, 0.9, 1.0, 1.5, 64.0])
@pytest.mark.parametrize(
    "name", ["lenet5", "lenet5:activation=relu", "lenet_dlg", "resnet18", "resnet18:activation=relu"]
)
def test_by_what_one_images_gradient_was_multiplied_is_told(name: str, by: float) -> None:
    network, leak, _ = client(name, [7])
    multiplied = leak._replace(gradients={n: by * g for n, g in leak.gradients.items()})
    found = factor(network, multiplied)
    assert found == 1 if by == 1 else found == pytest.approx(by, rel=1e-3)


@pytest.mark.parametrize(
    "defense", ["fp16", "bf16", "int8", "noise:std=0.01", "prune:share=0.99", "topk:share=0.99", "sign"]
)
@pytest.mark.parametrize("name", ["lenet5", "lenet_dlg", "lenet_dlg:activation=relu", "resnet18"])
def test_where_no_factor_can_be_told_there_is_none(name: str, defense: str) -> None:
    assert factor(*client(name, [7], defense=defense)[:2]) == 1


@pytest.mark.parametrize("name", ["lenet5", "resnet18"])
def test_without_a_bias_no_factor_is_told(name: str) -> None:
    assert factor(*client(name, [7], bias=False, defense="clip:bound=0.001")[:2]) == 1


@pytest.mark.parametrize("truth", [[7], [5, 5], [0, 3, 3, 3], [1, 2, 4, 8, 8, 16, 16, 19]])
def test_noise_is_averaged_over_all_of_the_heads_gradient(truth: list[int]) -> None:
    """The bias' gradient alone, of 20 entries, drowns in it."""
    for seed in range(5):
        assert recovered("lenet5", truth, seed=seed, defense="noise:std=0.1") == truth


@pytest.mark.parametrize(
    ("defense", "batch", "least"),
    [("soteria:share=0.8", 8, 0.95), ("dpsgd:multiplier=0.3", 8, 0.7), ("dpsgd:multiplier=0.3", 1, 0.7)],
)
def test_a_defence_of_the_features_or_with_weak_noise_hides_no_labels(
    defense: str, batch: int, least: float
) -> None:
    """Of twenty clients; chance is a tenth of single labels and 57 % of eight."""
    found = 0
    for seed in range(20):
        one = case(image=0, seed=seed, batch=batch, classes=10, defense=defense, dtype="float32")
        labels = recover(network_of(one), leaked(one).row(0), torch.full(one.shape, 0.5)).tolist()
        found += (Counter(labels) & Counter(secret_of(one, PHOTOS).labels[0].tolist())).total()
    assert found >= least * 20 * batch


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=8), st.integers(0, 1000))
def test_any_batch_of_an_untrained_lenet_is_counted(truth: list[int], seed: int) -> None:
    assert recovered("lenet5", truth, seed=seed) == sorted(truth)


def test_a_bias_of_batch_norm_is_not_taken_for_the_heads() -> None:
    """Rivals read labels off the last tensor of one dimension, whatever it is (B13)."""
    network = networks.build(NETWORKS.spec("resnet18"), (1, 3, 64, 64), CLASSES, 0)
    remove_bias(network)
    assert [name for name, weight in network.named_parameters() if weight.dim() == 1][-1].endswith("bn2.bias")
    assert network.head == "body.fc"


@given(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=5), st.sampled_from(["float32", "float64"]))
def test_the_softmax_of_recovered_labels_is_exactly_one_hot(labels: list[int], dtype: str) -> None:
    found = logits(torch.tensor(labels), CLASSES).to(getattr(torch, dtype)).softmax(-1)
    assert torch.equal(found, one_hot(torch.tensor(labels)).to(found))


def test_a_gradient_without_numbers_still_gives_labels() -> None:
    network = networks.build(NETWORKS.spec("lenet5"), (2, 3, 32, 32), CLASSES, 0)
    weights: Tensors = dict(network.named_parameters())
    broken = {name: weight * torch.nan for name, weight in weights.items()}
    assert len(recover(network, Leak(weights, {}, broken), torch.full((2, 3, 32, 32), 0.5))) == 2


def with_dropout(truth: list[int]) -> tuple[Network, Leak, Tensor]:
    """What the client of an Inception shares, and the mask that it drew."""
    images = torch.rand(len(truth), 3, 299, 299, generator=torch.Generator().manual_seed(0))
    network = networks.build(NETWORKS.spec("inception_v3"), (len(truth), 3, 299, 299), CLASSES, 0)
    weights: Tensors = dict(network.named_parameters())
    buffers = {name: buffer for name, buffer in network.named_buffers() if name.startswith("body.")}
    drawn = network.draw_masks(len(truth), torch.Generator().manual_seed(5))
    shared = gradients(network, weights, {**buffers, **drawn}, images, one_hot(torch.tensor(truth)))
    return network, Leak(weights, buffers, shared), drawn["body.dropout.mask"]


def test_a_mask_before_the_head_is_read_off_its_gradient() -> None:
    network, leak, truth = with_dropout([3, 17])
    labels = torch.tensor([3, 17])
    (found,) = masks.read(network, leak, labels).items()
    assert found[0] == "body.dropout.mask"
    assert torch.equal(found[1], truth)
    assert not masks.read(network, leak, torch.tensor([3, 3]))
    noisy = make("noise:std=1e-6")(leak.gradients, torch.Generator())
    for other in (noisy, {name: torch.zeros_like(g) for name, g in noisy.items()}):
        assert not masks.read(network, leak._replace(gradients=other), labels)


def test_networks_without_dropout_before_the_head_have_no_mask_to_read() -> None:
    for name in ("lenet5", "resnet18", "inception_v3:dropout=off"):
        side = SIDES.get(name.partition(":")[0], 32)
        network = networks.build(NETWORKS.spec(name), (2, 3, side, side), CLASSES, 0)
        assert not masks.read(network, Leak({}, {}, {}), torch.tensor([0, 1]))
