"""Closures: batched, traced and compiled ones against the eager one; and when to compile."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dlgbench.attacks.base import Attack
from dlgbench.case import Case, DType
from dlgbench.closures import Closure, Values, width_for
from dlgbench.compiler import Compiler
from dlgbench.leak import Leak, stack
from dlgbench.models import adapted
from dlgbench.prepare import ACTIVATIONS, MODULES
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.trial import attack_on
from dlgbench.victims import leak_of, network_of, secret_of

PHOTOS = DATASETS.make(DATASETS.spec("photos"), None)
CASE = Case(
    network=NETWORKS.spec("lenet_dlg"), dataset=DATASETS.spec("photos"), attack=ATTACKS.spec("dlg"),
    defense=DEFENSES.spec("none"), batch=2, resolution=32, preparation="fit", channels=3, classes=10,
    steps=1, dtype="float32", image=0, seed=0,
)  # fmt: skip
SMALLEST = {"inception_v3": 299, "resnet18": 64, "densenet121": 64, "mobilenet_v2": 64}
"""Sides in px for networks that take no 32, or whose batch norm of two values there says nothing; the graphs
are those of any side."""


def prepared(network: str, cases: int = 1, dtype: DType = "float32") -> tuple[Attack, Leak]:
    side = SMALLEST.get(network.partition(":")[0], 32)
    some = [
        replace(CASE, network=NETWORKS.spec(network), resolution=side, seed=seed, dtype=dtype)
        for seed in range(cases)
    ]
    networks = [network_of(case) for case in some]
    leaks = [leak_of(case, n, secret_of(case, PHOTOS)) for case, n in zip(some, networks, strict=True)]
    return attack_on(some, networks[0]), stack(leaks)


def assert_alike(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    """To a norm, since single values may vanish."""
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


def strided_otherwise(tensor: Tensor) -> Tensor:
    """The same values in another order of memory, which compiled code does not look at by itself."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


GRAPHS = [
    *(
        f"{network}:activation={activation}"
        for network in ("lenet5", "lenet_dlg", "resnet18")
        for activation in ACTIVATIONS
    ),
    "densenet121",
    "mobilenet_v2:dropout=known",
    "inception_v3:dropout=known",
]


def test_every_network_and_activation_is_traced() -> None:
    assert {text.partition(":")[0] for text in GRAPHS} == set(NETWORKS.entries)
    assert set(ACTIVATIONS) <= {text.partition("=")[2] for text in GRAPHS}
    assert set(ACTIVATIONS) == {"relu", *MODULES.values()}


@pytest.mark.parametrize("network", GRAPHS)
def test_the_traced_closure_is_the_eager_one(network: str) -> None:
    attack, leak = prepared(network, dtype="float64")
    example = attack.example(leak)
    graph = attack.closure.trace(*example)
    values = graph(*attack.closure.flat(*example))
    assert_alike(values, attack.closure(*example), 1e-9)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the compiler's own files go there too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return tmp_path / "dlgbench"


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def of_every_activation(cases: int) -> tuple[Attack, Leak]:
    """An attack on a small network that has all of them: compiling one for each takes minutes."""
    kinds: tuple[type[nn.Module], ...] = (nn.ReLU, *MODULES)
    layers = [layer for kind in kinds for layer in (nn.Linear(12, 12), kind())]
    body = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), *layers, nn.Linear(12, 10))
    generator = torch.Generator().manual_seed(0)
    for parameter in body.parameters():
        nn.init.normal_(parameter, generator=generator)
    network = adapted(body, CASE.shape, (0.5,), (0.5,))
    some = [replace(CASE, seed=seed) for seed in range(cases)]
    return attack_on(some, network), stack([leak_of(case, network, secret_of(case, PHOTOS)) for case in some])


@needs_compiler
@pytest.mark.parametrize("network", ["lenet5", "lenet_dlg", "resnet18", "every activation"])
def test_the_compiled_closure_is_the_eager_one(network: str, cache: Path) -> None:
    cases = 1 if network == "resnet18" else 3
    attack, leak = of_every_activation(cases) if "every" in network else prepared(network, cases)
    example = attack.example(leak)
    eager = attack.closure(*example)
    told: list[str] = []
    figures = Compiler("on", told.append).prepare(attack.closure, network, example, 1)
    assert attack.closure.facts["closure"] == "compiled", told
    assert figures["compile_seconds"] > 0
    for same in (example, tree_map(strided_otherwise, example)):
        assert_alike(attack.closure(*same), eager, 1e-3)  # deep networks differ by more than LeNet
    assert cache.stat().st_mode & 0o077 == 0


@needs_compiler
def test_compiled_code_is_kept_for_the_next_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, leak = prepared("lenet5")
    example = attack.example(leak)
    assert "compile_seconds" in Compiler("on").prepare(attack.closure, "this", example, 1)
    assert [path.suffix for path in cache.glob("*.pt2")] == [".pt2"]
    monkeypatch.setattr(Closure, "compile", None)
    again, _ = prepared("lenet5")
    figures = Compiler("auto").prepare(again.closure, "this", example, 1)
    assert list(figures) == ["compiled_earlier_in_seconds"]
    assert again.closure.facts["closure"] == "compiled"
    (kept,) = cache.glob("*.pt2")
    kept.write_bytes(kept.read_bytes()[:1000])
    damaged, _ = prepared("lenet5")
    Compiler("auto").prepare(damaged.closure, "this", example, 1)
    assert damaged.closure.facts["closure"] == "eager"
    other, _ = prepared("lenet5")
    figures = Compiler("auto").prepare(other.closure, "another", example, 1)
    assert (figures["calls_expected"], other.closure.facts["closure"]) == (1, "eager")


def test_of_two_at_once_one_compiles_and_the_other_waits(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def compile(self: Closure, path: Path, *example: object) -> None:
        made.append(path)
        time.sleep(0.3)
        path.write_bytes(b"code")

    monkeypatch.setattr(Closure, "compile", compile)
    monkeypatch.setattr(Closure, "load", lambda self, path, *example: path.stat())
    attack, leak = prepared("lenet5")
    with ThreadPoolExecutor(2) as pool:
        work = [
            pool.submit(Compiler("on").prepare, attack.closure, "any", attack.example(leak), 1)
            for _ in range(2)
        ]
        figures = sorted(len(one.result()) for one in work)
    assert len(made) == 1
    assert figures == [1, 4]  # one found it compiled earlier


def test_a_compiler_that_fails_is_told_of_once_and_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(Closure, "compile", fail)
    told: list[str] = []
    ours = Compiler("on", told.append)
    for _ in range(2):
        attack, leak = prepared("lenet5")
        ours.prepare(attack.closure, "any", attack.example(leak), 1)
        assert attack.closure.facts["closure"] == "eager"
    (message,) = told
    assert "no compiler here" in message
    assert "\n" not in message
    assert not list(cache.glob("*.pt2"))


@pytest.mark.parametrize("fault", ["off", "nan", "second"])
def test_compiled_code_that_errs_is_not_used(
    fault: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, leak = prepared("lenet5")
    example = attack.example(leak)
    right = [tensor.clone() for tensor in attack.closure(*example)]
    wrong = [right[0] * (torch.nan if fault == "nan" else 1.1), *right[1:]]
    answers = iter([right, wrong] if fault == "second" else [wrong, wrong, right, right])
    loaded = SimpleNamespace(loader=SimpleNamespace(boxed_run=lambda flat: next(answers)))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: loaded)
    monkeypatch.setattr(Closure, "compile", lambda self, path, *example: path.write_bytes(b"code"))
    told: list[str] = []
    ours = Compiler("on", told.append)
    for _ in range(2):  # the second time it is not tried
        ours.prepare(attack.closure, "any", example, 1)
        assert attack.closure.facts["closure"] == "eager"
    assert "Miscompiled" in told[0]
    assert not list(cache.glob("*.pt2"))
    if fault != "second":  # another closure is
        ours.prepare(attack.closure, "another", example, 1)
        assert attack.closure.facts["closure"] == "compiled"
    assert len(told) == 1


def test_a_home_that_cannot_be_written_to_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    attack, leak = prepared("lenet5")
    told: list[str] = []
    assert Compiler("auto", told.append).prepare(attack.closure, "any", attack.example(leak), 1) == {}
    assert attack.closure.facts["closure"] == "eager"
    assert len(told) == 1


@pytest.mark.parametrize(("calls", "compiles"), [(10, False), (10**9, True)])
def test_auto_compiles_where_that_repays(
    calls: int, compiles: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(Closure, "compile", lambda self, path, *example: asked.append(path))
    monkeypatch.setattr(Closure, "load", lambda self, path: None)
    monkeypatch.setattr(Path, "replace", lambda self, other: other)
    attack, leak = prepared("lenet5")
    Compiler("auto").prepare(attack.closure, "any", attack.example(leak), calls)
    assert bool(asked) is compiles


def test_an_example_draws_nothing() -> None:
    attack, leak = prepared("inception_v3:dropout=fresh")
    before = attack.generators[0].get_state()
    attack.example(leak)
    assert torch.equal(attack.generators[0].get_state(), before)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_values_do_not_depend_on_the_width(width: int) -> None:
    attack, leak = prepared("lenet5", 5, "float64")
    dummies = attack.dummy_images.detach(), attack.dummy_labels.detach()
    whole = attack.closure(*dummies, leak)
    assert_alike(Closure(attack.distance, width)(*dummies, leak), whole, 1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    attack, leak = prepared("lenet5", 1, "float64")
    images, labels = attack.dummy_images.detach(), attack.dummy_labels.detach()
    values = attack.closure(images, labels, leak)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # four points, whose error is of fourth order: steps may be long enough that rounding does not count
    shifted = (images + h * direction for h in (1e-2, -1e-2, 2e-2, -2e-2))
    ahead, behind, far_ahead, far_behind = (float(attack.closure(x, labels, leak).objective) for x in shifted)
    slope = (8 * (ahead - behind) - (far_ahead - far_behind)) / 12e-2
    assert float((values.images * direction).sum()) == pytest.approx(slope, rel=1e-6)


class Counted(Closure):
    """Stands for compiled code: it takes exactly ``width`` cases."""

    def rounded(self, cases: int) -> int:
        return -(-cases // self.width) * self.width

    def __call__(self, images: Tensor, labels: Tensor, leak: Leak) -> Values:
        assert len(images) % self.width == 0
        assert {len(tensor) for tensor in leak.weights.values()} == {len(images)}
        return super().__call__(images, labels, leak)


def test_only_active_cases_are_evaluated_in_whole_calls() -> None:
    attack, leak = prepared("lenet5", 5)
    dummies = attack.dummy_images.detach(), attack.dummy_labels.detach()
    whole = attack.evaluate(*dummies, leak)
    attack.closure = Counted(attack.distance, 2)
    attack.active[torch.tensor([0, 3])] = False
    some = attack.evaluate(*dummies, leak)
    assert some.objective.isnan().tolist() == [True, False, False, True, False]
    active = [1, 2, 4]
    assert_alike([part[active] for part in some], [part[active] for part in whole], 1e-5)
    assert not some.images[[0, 3]].any()


def test_a_call_takes_what_the_device_is_filled_by() -> None:
    cpu = torch.device("cpu")
    assert width_for(32**2, cpu) == width_for(2 * 32**2, cpu) == 2
    assert width_for(8 * 32**2, cpu) == 1
    assert width_for(224**2, cpu) == 1
    assert width_for(32**2, torch.device("meta")) == 1
