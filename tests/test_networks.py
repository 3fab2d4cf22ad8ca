"""The networks: torchvision's and the textbook's, with other activations, initialisations and dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torchvision.transforms.functional import normalize

from dlgbench import networks
from dlgbench.errors import Unsuitable, UsageError
from dlgbench.networks import Shape, build
from dlgbench.prepare import ACTIVATIONS, Network, initialise, probe, replace_activation
from dlgbench.registry import NETWORKS
from dlgbench.stochastic import Bottleneck, Dropout, divergence

PUBLISHED = [
    ("lenet5", 1, 10, 61_706),
    ("lenet_dlg", 3, 100, 85_036),
    ("resnet18", 3, 1000, 11_689_512),
    ("densenet121", 3, 1000, 7_978_856),
    ("mobilenet_v2", 3, 1000, 3_504_872),
    ("inception_v3", 3, 1000, 27_161_264),
]


def mobilenet_v2(**options: object) -> nn.Module:
    """torchvision's, with ReLU for ReLU6."""
    model: nn.Module = torchvision.models.mobilenet_v2(**options)
    for layer in model.modules():
        for name, child in layer.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(layer, name, nn.ReLU())
    return model


DEEP: dict[str, Callable[..., nn.Module]] = {
    "resnet18": torchvision.models.resnet18, "densenet121": torchvision.models.densenet121,
    "mobilenet_v2": mobilenet_v2, "inception_v3": torchvision.models.inception_v3,
}  # fmt: skip
NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda x: 1 / (1 + (-x).exp()), "relu": lambda x: x.clamp_min(0), "tanh": Tensor.tanh,
    "softplus": lambda x: x.exp().log1p(), "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + (x / 2**0.5).erf()) / 2,
}  # fmt: skip


@cache
def built(text: str, batch: int = 2, side: int = 32, classes: int = 1000, channels: int = 3) -> Network:
    """A network that no test may change."""
    return build(NETWORKS.spec(text), (batch, channels, side, side), classes, seed=5)


def pixels(batch: int, side: int, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def blueprint(name: str) -> nn.Module:
    """torchvision's own network, without weights."""
    with torch.device("meta"):
        return DEEP[name](weights=None, **({"init_weights": False} if name == "inception_v3" else {}))


def on_meta(text: str, batch: int, side: int) -> Network:
    """What `build` gives, without weights: quickly."""
    with torch.device("meta"):
        return build(NETWORKS.spec(text), (batch, 3, side, side), 10, 0)


def reference(name: str, network: Network) -> nn.Module:
    """torchvision's own network, in train mode, without dropout, with the weights of ``network``."""
    model = blueprint(name).to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    loaded = model.load_state_dict(network.body.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all("running_" in key or key.endswith("num_batches_tracked") for key in loaded.missing_keys)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model.train()


def logits_of(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """All heads of torchvision's network for images in [0, 1]."""
    with torch.no_grad():
        logits = model(normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return tuple(logits) if isinstance(logits, tuple) else (logits,)


# What they are


@pytest.mark.parametrize(("name", "channels", "classes", "count"), PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(
    name: str, channels: int, classes: int, count: int
) -> None:
    facts = NETWORKS.entry(name).facts
    network = built(name, facts["batch"], facts["resolution"], classes, channels)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_every_network_is_tested() -> None:
    assert {name for name, *_ in PUBLISHED} == set(NETWORKS.entries)


def test_the_choices_of_activation_are_the_ones_there_are() -> None:
    assert get_args(networks.Activation) == tuple(ACTIVATIONS)
    assert set(NAMED) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_what_they_are_called(name: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), NAMED[name](x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
def test_lenet5_is_the_textbooks(activation: str) -> None:
    act, images = NAMED[activation], pixels(3, 32, 1)
    network = built(f"lenet5:activation={activation}", 3, 32, 10, 1)
    w1, b1, w2, b2, w3, b3, w4, b4, w5, b5 = network.parameters()
    hidden = F.avg_pool2d(act(F.conv2d(images, w1, b1)), 2)
    hidden = F.avg_pool2d(act(F.conv2d(hidden, w2, b2)), 2).flatten(1)
    hidden = act(act(hidden @ w3.T + b3) @ w4.T + b4)
    torch.testing.assert_close(network(images), (hidden @ w5.T + b5,))
    assert [tuple(w.shape) for w in (w1, w2, w3, w4)] == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120)]


@pytest.mark.parametrize("side", [32, 33])
def test_lenet_dlg_is_the_papers(side: int) -> None:
    act, images = NAMED["sigmoid"], pixels(2, side)
    network = built("lenet_dlg", 2, side, 100)
    w1, b1, w2, b2, w3, b3, w4, b4 = network.parameters()
    hidden = act(F.conv2d(images, w1, b1, stride=2, padding=2))
    hidden = act(F.conv2d(hidden, w2, b2, stride=2, padding=2))
    hidden = act(F.conv2d(hidden, w3, b3, padding=2)).flatten(1)
    torch.testing.assert_close(network(images), (hidden @ w4.T + b4,))


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("resnet18:activation=relu", 64),
        ("densenet121:activation=relu", 64),
        ("mobilenet_v2:activation=relu,dropout=off", 64),
        ("inception_v3:activation=relu,dropout=off", 299),
    ],
)
def test_with_relu_the_logits_are_torchvisions(text: str, side: int) -> None:
    name, images = text.partition(":")[0], pixels(2, side).double()
    network = copy.deepcopy(built(text, 2, side)).double()
    normal = (images - network.mean) / network.std  # with these, which are single precision's
    with torch.no_grad():
        expected = reference(name, network).double()(normal)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(expected) == len(network.heads) == (2 if name == "inception_v3" else 1)
    for ours, theirs in zip(network(images), expected, strict=True):
        assert theirs.std() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def other_activation(name: str) -> Callable[..., Tensor]:
    def activation(x: Tensor, inplace: bool = False) -> Tensor:
        return NAMED[name](x)

    return activation


CASES = [
    *(("resnet18", activation, 224) for activation in ACTIVATIONS),
    ("densenet121", "sigmoid", 224),
    ("mobilenet_v2", "sigmoid", 224),
    ("inception_v3", "sigmoid", 299),
]


@pytest.mark.parametrize(("name", "activation", "side"), CASES)
def test_every_relu_is_replaced(
    monkeypatch: pytest.MonkeyPatch, name: str, activation: str, side: int
) -> None:
    """The truth is torchvision's network while F.relu, which nn.ReLU calls too, is another function."""
    images = pixels(2, side)
    network = built(name if activation == "sigmoid" else f"{name}:activation={activation}", 2, side)
    model, ours = reference(name, network), network(images)
    with_relu = logits_of(model, images)
    monkeypatch.setattr(F, "relu", other_activation(activation))
    for mine, theirs, relu in zip(ours, logits_of(model, images), with_relu, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 * float(theirs.abs().max()))
        assert activation == "relu" or (mine - relu).abs().max() > 0.05 * theirs.abs().max()


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_no_relu_of_any_sort_is_left(name: str, activation: str) -> None:

    body = blueprint(name)
    assert relus(fx.symbolic_trace(body.train()))
    replaced = replace_activation(body.train(), activation)
    assert isinstance(replaced, fx.GraphModule)
    assert not relus(replaced)
    assert [key for key, _ in replaced.named_parameters()] == [key for key, _ in body.named_parameters()]


def relus(graph: fx.GraphModule) -> list[str]:
    """The nodes that call a ReLU, as a module, as a function or as a method."""
    modules = dict(graph.named_modules())
    functions: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_, F.relu6)
    return [
        node.name
        for node in graph.graph.nodes
        if (node.op == "call_module" and isinstance(modules[str(node.target)], nn.ReLU | nn.ReLU6))
        or (node.op == "call_function" and node.target in functions)
        or (node.op == "call_method" and str(node.target).startswith("relu"))
    ]


class Relus(nn.Module):
    """Every way to write a ReLU that a torch network of today uses."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.module(x - 1), F.relu(x - 2, inplace=True), torch.relu(x), torch.relu_(x - 3)])


def test_every_way_to_write_relu_is_replaced() -> None:
    x = torch.linspace(-4, 4, 9)
    truth = torch.cat([(x - 1).tanh(), (x - 2).tanh(), x.tanh(), (x - 3).tanh()])
    torch.testing.assert_close(replace_activation(Relus(), "tanh")(x), truth)


def test_no_global_function_is_patched() -> None:
    before = F.relu, torch.relu, nn.ReLU.forward, F.dropout
    network = build(NETWORKS.spec("densenet121"), (1, 3, 64, 64), 10, seed=0)
    network(pixels(1, 64))
    assert (F.relu, torch.relu, nn.ReLU.forward, F.dropout) == before
    x = torch.tensor([-1.0, 2.0])
    assert F.relu(x).tolist() == torch.relu(x).tolist() == nn.ReLU()(x).tolist() == [0, 2]
    assert F.relu.__module__ == "torch.nn.functional"


# Weights


@pytest.mark.parametrize("text", ["lenet_dlg", "lenet5", "resnet18", "lenet5:init=variance_preserving"])
def test_the_weights_depend_on_the_seed_alone(text: str) -> None:
    def weights(seed: int, shape: Shape = (1, 3, 64, 64)) -> list[Tensor]:
        return list(build(NETWORKS.spec(text), shape, 10, seed).parameters())

    before = torch.get_rng_state()
    first, again, other = weights(1), weights(1), weights(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.std() > 0)
    assert all(map(torch.equal, first, weights(1, (3, 3, 64, 64))))


def test_a_double_network_has_the_weights_of_the_single_one() -> None:
    single, double = (
        build(NETWORKS.spec("lenet5"), (1, 3, 32, 32), 10, 7, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert double.mean.dtype == double.std.dtype == torch.float64
    for ours, theirs in zip(double.parameters(), single.parameters(), strict=True):
        assert ours.dtype == torch.float64
        assert torch.equal(ours, theirs.double())


@pytest.mark.parametrize(
    ("text", "bound"),
    [("lenet_dlg", 0.5), ("lenet5:init=uniform:0.5", 0.5), ("resnet18:init=uniform:2e-2", 0.02)],
)
def test_a_uniform_init_reaches_its_bounds(text: str, bound: float) -> None:
    values = torch.cat([parameter.flatten() for parameter in built(text).parameters()])
    assert 0.999 * bound < values.max() <= bound
    assert -bound <= values.min() < -0.999 * bound
    assert abs(values.mean()) < 4 * bound / (3 * len(values)) ** 0.5
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    biases = torch.cat([p for name, p in built(text).named_parameters() if name.endswith("bias")])
    assert biases.std() > 0.4 * bound


def test_the_default_init_is_torchvisions() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torchvision.models.resnet18(weights=None)
    assert all(map(torch.equal, built("resnet18").parameters(), expected.parameters()))


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("unifrom:0.5", ["unknown init 'unifrom", "did you mean 'uniform"]),
        ("", ["unknown init"]),
        *(
            (f"uniform:{bound}", ["uniform:BOUND", f"'uniform:{bound}'"])
            for bound in ("", "x", "0", "-1", "nan", "inf")
        ),
        ("uniform", ["uniform:BOUND"]),
        ("variance_preserving:2", ["variance_preserving"]),
        ("default:1", ["default"]),
    ],
)
def test_a_bad_init_is_refused(init: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        build(NETWORKS.spec(f"lenet5:init={init}"), (1, 1, 32, 32), 10, 0)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def deep(init: str, activation: str) -> list[float]:
    """The mean square of the pre-activations of every layer of a wide network fed with ``f(N(0, 1))``."""
    width, depth, squares = 1024, 12, list[float]()
    generator = torch.Generator().manual_seed(0)
    network = Network(nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        initialise(network, init, activation)
    body = network.body
    assert isinstance(body, nn.Sequential)
    for layer in body:
        layer.register_forward_pre_hook(lambda _, inputs: (NAMED[activation](inputs[0]),))
        layer.register_forward_hook(lambda _, __, output: squares.append(output.square().mean().item()))
    with torch.no_grad():
        body(torch.randn(16, width, generator=generator))
    return squares


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_variance_preserving_keeps_its_promise(activation: str) -> None:
    assert deep("variance_preserving", activation) == pytest.approx([1] * 12, rel=0.3)
    assert not 0.5 < deep("default", activation)[-1] < 2


def test_variance_preserving_counts_a_convolutions_fan_in() -> None:
    network = Network(nn.Sequential(nn.Conv2d(8, 400, 5), nn.BatchNorm2d(400), nn.Linear(3, 2, bias=False)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        initialise(network, "variance_preserving", "relu")  # where it is He et al. 2015
    convolution = network.get_submodule("body.0")
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    assert convolution.weight.std().item() == pytest.approx((2 / (8 * 25)) ** 0.5, rel=0.02)
    assert not convolution.bias.any()


# Batch norm and dropout


def test_batch_norm_in_train_mode_has_no_buffers() -> None:
    assert {name for name, _ in built("resnet18").named_buffers()} == {"mean", "std"}
    images = pixels(4, 64)
    together, alone = built("resnet18")(images)[0][:2], built("resnet18")(images[:2])[0]
    assert not torch.allclose(together, alone)
    assert torch.equal(built("resnet18")(images)[0], built("resnet18")(images)[0])


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_batch_norm_in_eval_mode_uses_its_running_statistics(name: str) -> None:
    network, images = built(f"{name}:activation=relu,batchnorm=eval"), pixels(3, 64)
    state = {key: tensor.clone() for key, tensor in network.named_buffers()}
    assert sum(key.endswith("running_var") for key in state) == sum(
        isinstance(layer, nn.BatchNorm2d) for layer in blueprint(name).modules()
    )
    together = network(images)[0]
    torch.testing.assert_close(together[:1], network(images[:1])[0], rtol=1e-3, atol=1e-5)
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.named_buffers())
    model = reference(name, network).eval()
    model.load_state_dict(network.body.state_dict())
    normalised = (images - network.mean) / network.std
    torch.testing.assert_close(together, model(normalised), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["fresh", "known"])
def test_dropout_masks_keep_half_and_double_it(mode: str) -> None:
    network = on_meta(f"inception_v3:dropout={mode}", 2, 299)
    ((name, mask),) = network.draw_masks(2, torch.Generator().manual_seed(4)).items()
    assert (name, mask.shape) == ("body.dropout.mask", (2, 2048, 1, 1))
    assert set(mask.flatten().tolist()) == {0.0, 2.0}
    assert abs(mask.mean() - 1) < 4 / 4096**0.5
    assert torch.equal(mask, network.draw_masks(2, torch.Generator().manual_seed(4))[name])
    assert network.mask_known == (mode == "known")


def test_dropout_is_fresh_unless_told_otherwise() -> None:
    assert NETWORKS.spec("inception_v3").get("dropout") == "fresh"


def test_dropout_can_be_off() -> None:
    network = on_meta("inception_v3:dropout=off", 2, 299)
    assert not network.draw_masks(2, torch.Generator())
    assert not any(isinstance(layer, Dropout | nn.Dropout) for layer in network.modules())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate(p: float) -> None:
    network = Network(nn.Sequential(nn.Flatten(), Dropout(p))).double()
    probe(network, (10, 1, 100, 100))
    generator = torch.Generator().manual_seed(0)
    (mask,), (other,) = (network.draw_masks(10, generator).values() for _ in range(2))
    assert (mask.dtype, mask.shape) == (torch.float64, (10, 10_000))
    assert sorted(set(mask.flatten().tolist())) == pytest.approx([0, 1 / (1 - p)])
    assert abs((mask == 0).double().mean().item() - p) < 4 * (p * (1 - p) / 1e5) ** 0.5
    assert not torch.equal(mask, other)


# What they cannot take


def test_inception_needs_two_images_to_train() -> None:
    with pytest.raises(Unsuitable, match=r"inception_v3 .*1 image.*more than 1 value per channel"):
        on_meta("inception_v3", 1, 299)
    assert [head.shape for head in built("inception_v3", 2, 299)(pixels(2, 299))] == [(2, 1000), (2, 1000)]


def test_inception_takes_one_image_in_eval_mode() -> None:
    network = on_meta("inception_v3:batchnorm=eval", 1, 299)
    assert [head.shape for head in network(torch.empty(1, 3, 299, 299, device="meta"))] == [(1, 10), (1, 10)]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("lenet5", False),
        ("lenet_dlg", True),
        ("resnet18", False),
        ("densenet121", False),
        ("mobilenet_v2", False),
        ("inception_v3", False),
        ("inception_v3:dropout=off", False),
        ("resnet18:batchnorm=eval", True),
        ("densenet121:batchnorm=eval", False),
        ("inception_v3:batchnorm=eval", False),
    ],
)
def test_eight_pixels_are_taken_or_refused_with_a_reason(text: str, fits: bool) -> None:
    if fits:
        assert on_meta(text, 1, 8)(torch.empty(1, 3, 8, 8, device="meta"))[0].shape == (1, 10)
        return
    with pytest.raises(Unsuitable, match=r"\b8\b") as caught:
        on_meta(text, 1, 8)
    assert str(caught.value).startswith(text.partition(":")[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("side", [1, 31, 75, 223])
def test_odd_resolutions_are_taken_or_refused(name: str, side: int) -> None:
    refused_or_shape(name, 1, side)
    refused_or_shape(f"{name}:batchnorm=eval", 3, side)


def refused_or_shape(text: str, batch: int, side: int) -> None:
    """What `build` takes must run, and what it refuses must have a reason."""
    try:
        network = on_meta(text, batch, side)
    except Unsuitable:
        return  # any other error fails the test
    for logits in network(torch.empty(batch, 3, side, side, device="meta")):
        assert logits.shape == (batch, 10)


@pytest.mark.parametrize("side", range(1, 40))
def test_lenets_take_a_resolution_or_refuse_it(side: int) -> None:
    assert built("lenet_dlg", 1, side, 10, 1)(pixels(1, side, 1))[0].shape == (1, 10)
    if side < 16:
        with pytest.raises(Unsuitable, match=f"16 px, got {side}"):
            built("lenet5", 1, side, 10, 1)
    else:
        assert built("lenet5", 1, side, 10, 1)(pixels(1, side, 1))[0].shape == (1, 10)


def test_the_divergence_is_that_of_torchs_distributions() -> None:
    code = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = torch.distributions.Normal(code[:, :6], code[:, 6:].exp().sqrt())
    truth = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert float(divergence(code)) == pytest.approx(float(truth))


def test_a_bottleneck_samples_with_its_draws_and_without_any_takes_the_mean() -> None:
    layer = Bottleneck(nn.Linear(7, 3), 4).double()
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = features @ layer.encoder.weight.T + layer.encoder.bias
    for draws in (torch.zeros(1, 4), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))):
        layer.sample.mask = draws.double()
        sample = code[:, :4] + torch.sqrt(torch.exp(code[:, 4:])) * draws
        logits = (
            sample @ layer.decoder.weight.T + layer.decoder.bias
        ) @ layer.head.weight.T + layer.head.bias
        ours, theirs = layer(features)
        torch.testing.assert_close(ours, logits)
        torch.testing.assert_close(theirs, code)


def test_draws_for_another_number_of_images_are_refused() -> None:
    layer = Dropout(0.5)
    layer.mask = torch.ones(2, 5)
    with pytest.raises(ValueError, match="expected 2 images, for which was drawn, got 3"):
        layer(torch.ones(3, 5))
