"""What a defence costs: the training against a bare loop, its record, and the split of the data."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from scipy.stats import kstest, norm

from dlgbench import runner, trial, utility
from dlgbench.attacks.none import none
from dlgbench.case import Case, stream
from dlgbench.defenses import make
from dlgbench.defenses.clipping import DPSGD
from dlgbench.display import display
from dlgbench.grid import Data, why_not
from dlgbench.records import Record, decode, encode
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.store import Store
from dlgbench.training import accuracy
from dlgbench.victims import labelled, network_of

from .clients import case

DIGITS = DATASETS.make(DATASETS.spec("digits"), None)
CPU = torch.device("cpu")
TRAINING = case(
    network="lenet_dlg", dataset="digits", attack="none", batch=32, channels=1, classes=10, steps=150,
    dtype="float32", image=0,
)  # fmt: skip


def quiet(step: int, objective: float, psnr: float) -> None:
    pass


def trained(*cases: Case, timeout: float = math.inf) -> list[Record]:
    return list(utility.run(cases, DIGITS, CPU, timeout, quiet))


def defended(one: Case, text: str) -> Case:
    return replace(one, defense=DEFENSES.spec(text))


def test_on_all_images_at_once_it_is_adam() -> None:
    one = replace(TRAINING, dtype="float64")
    images, labels = labelled(one, DIGITS, range(40))
    ours, theirs = network_of(one), network_of(one)
    list(islice(none(ours, images, labels, make("none"), 40, torch.Generator()), 5))
    optimizer = torch.optim.Adam(theirs.requires_grad_().parameters(), 2e-3)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(theirs(images)[0], labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-8, atol=1e-10)


def test_batches_are_poisson_samples_and_updates_sums() -> None:
    class Counts:
        """Shares how many images there were, and remembers which."""

        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []
            self.weights: dict[str, torch.Tensor] = {}

        def update(self, client: Any, images: torch.Tensor, labels: Any, generator: Any) -> Any:
            self.seen.append(images[:, 0, 0, 0])
            self.weights = client.weights
            return {name: torch.ones_like(weight) for name, weight in client.weights.items()}

    images = torch.arange(100.0).view(100, 1, 1, 1).expand(100, 1, 32, 32)
    counts, network = Counts(), network_of(TRAINING)
    updates = none(network, images, torch.zeros(100).long(), counts, 20, torch.Generator().manual_seed(0))
    for _ in islice(updates, 300):
        for weight in counts.weights.values():
            assert weight.grad is not None
            assert torch.equal(weight.grad, torch.full_like(weight, len(counts.seen[-1]) / 20))
    sizes = torch.tensor([float(len(some)) for some in counts.seen])
    assert abs(float(sizes.mean()) - 20) < 4 * math.sqrt(100 * 0.2 * 0.8 / 300)
    assert float(sizes.var()) == pytest.approx(100 * 0.2 * 0.8, rel=0.35)  # a Poisson sample's, not 0
    often = torch.bincount(torch.cat(counts.seen).long(), minlength=100).double()
    assert float((often - 60).abs().max()) < 4.5 * math.sqrt(300 * 0.2 * 0.8)


def test_every_update_draws_anew_for_its_images() -> None:
    class Draws:
        """Shares nothing, and remembers what was drawn for how many images."""

        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def update(self, client: Any, images: torch.Tensor, labels: Any, generator: Any) -> Any:
            (mask,) = (value for name, value in client.buffers.items() if name.endswith(".mask"))
            assert mask.shape == (len(images), 256)
            self.seen.append(mask)
            return {name: torch.zeros_like(weight) for name, weight in client.weights.items()}

    one, draws = defended(TRAINING, "precode"), Draws()
    images, labels = labelled(one, DIGITS, range(60))
    list(islice(none(network_of(one), images, labels, draws, 20, torch.Generator().manual_seed(0)), 30))
    every = torch.cat(draws.seen)
    assert kstest(every.flatten().numpy(), norm.cdf).pvalue > 1e-3
    assert len({float(mask[0, 0]) for mask in draws.seen}) == 30


def test_undefended_training_learns_and_noise_costs() -> None:
    long = replace(TRAINING, steps=400)
    plain, noisy, again = trained(long, defended(long, "noise:std=1"), long)
    assert plain.utility["accuracy"] > 0.9
    assert noisy.utility["accuracy"] < plain.utility["accuracy"] - 0.1
    assert again.utility["accuracy"] == plain.utility["accuracy"]


def test_the_record_tells_what_an_update_costs() -> None:
    (record,) = trained(replace(defended(TRAINING, "fp16"), steps=10))
    weights = sum(weight.numel() for weight in network_of(TRAINING).parameters())
    assert (record.status, record.images, record.outcome) == ("done", (), "failed")
    assert record.utility["update_bytes"] == 2 * weights
    assert 0 < record.utility["update_seconds"] <= record.cost["seconds"] / 5  # half of the ten take longer
    assert record.utility["epsilon"] is record.utility["delta"] is None
    assert decode(encode(record)) == record


@pytest.mark.filterwarnings("ignore")  # of Opacus
def test_privacy_is_accounted_for_the_whole_training() -> None:
    (record,) = trained(replace(defended(TRAINING, "dpsgd:multiplier=2"), steps=12))
    images = len(DIGITS) - round(0.2 * len(DIGITS))
    assert record.utility["epsilon"] == make("dpsgd:multiplier=2").epsilon(32 / images, 12, 1e-5)
    assert record.utility["delta"] == 1e-5


def test_the_accuracy_is_that_of_the_images_kept_back() -> None:
    images, labels = labelled(TRAINING, DIGITS, range(len(DIGITS)))
    data = utility.split(TRAINING, images, labels)
    assert len(data.test_images) == round(0.2 * len(DIGITS))
    both = torch.cat([data.images, data.test_images]).flatten(1)
    assert torch.equal(both.sum(1).sort().values, images.flatten(1).sum(1).sort().values)
    other = utility.split(replace(TRAINING, seed=1), images, labels)
    same = utility.split(defended(TRAINING, "sign"), images, labels)
    assert torch.equal(same.test_labels, data.test_labels)  # pairs of the same seed
    assert not torch.equal(other.test_labels, data.test_labels)
    (record,) = trained(replace(TRAINING, steps=60))
    network, draws = network_of(TRAINING), torch.Generator().manual_seed(stream(TRAINING, "training"))
    list(islice(none(network, *data[:2], make("none"), 32, draws), 60))
    right = [
        int(network(image[None])[0].argmax()) == int(label)
        for image, label in zip(data.test_images, data.test_labels, strict=True)
    ]
    assert record.utility["accuracy"] == pytest.approx(sum(right) / len(right), abs=0.003)
    assert accuracy(network, *data[2:]) == pytest.approx(sum(right) / len(right), abs=0.003)


def test_a_training_without_time_says_so() -> None:
    first, second = trained(TRAINING, replace(TRAINING, seed=1), timeout=0.0)
    assert (first.status, second.status) == ("timeout", "timeout")
    assert first.broken


def test_a_training_that_blows_up_is_a_result() -> None:
    wild = replace(TRAINING, attack=ATTACKS.spec("none:rate=1e15"))
    wild = replace(wild, network=NETWORKS.spec("lenet_dlg:activation=relu"))
    (record,) = trained(replace(wild, steps=30))
    assert record.status == "diverged"
    assert record.utility["accuracy"] < 0.5


def test_a_run_trains_where_nobody_attacks() -> None:
    setup = trial.Setup(accelerator="cpu")
    shown: list[int] = []
    cases = [replace(TRAINING, steps=6, seed=seed) for seed in range(2)]
    found = trial.run(cases, DIGITS, setup, lambda step, objective, psnr: shown.append(step))
    assert [(record.case, pictures) for record, pictures in found] == [(one, b"") for one in cases]
    assert shown == sorted(shown)
    assert shown[-1] == 6


@pytest.mark.parametrize(("change", "reason"), [
    ({"dataset": DATASETS.spec("photos")}, "no classes to train for"),
    ({"batch": 4, "defense": DEFENSES.spec("secagg")}, "batch of 8 images or more"),
    ({"batch": 1, "defense": DEFENSES.spec("mixup")}, "batch of 2 images or more"),
    (
        {"network": NETWORKS.spec("inception_v3"), "channels": 3, "resolution": 299,
         "defense": DEFENSES.spec("precode")},
        "precode needs a network with one head",
    ),
])  # fmt: skip
def test_what_cannot_be_trained_is_skipped_with_a_reason(change: dict[str, Any], reason: str) -> None:
    assert reason in str(why_not(replace(TRAINING, **change), Data(None)))
    assert why_not(TRAINING, Data(None)) is None


def test_a_run_skips_what_is_not_installed_and_runs_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(DPSGD, "refusal", lambda self, trains: "it is not there")
    store = Store(tmp_path)
    store.prepare()
    cases = [replace(defended(TRAINING, text), steps=2) for text in ("none", "dpsgd", "sign")]
    setup, limits = trial.Setup(accelerator="cpu"), runner.Limits()
    watch = display(Console(file=io.StringIO()), 3)
    found = runner.run(cases, store, Data(None), setup, limits, watch).computed
    assert {(r.case.defense.name, r.status) for r in found} == {
        ("none", "done"), ("dpsgd", "skipped"), ("sign", "done")
    }  # fmt: skip
    assert not runner.run(cases, store, Data(None), setup, limits, watch).computed

    monkeypatch.setattr(DPSGD, "refusal", lambda self, trains: None)  # it has been installed
    (later,) = runner.run(cases, store, Data(None), setup, limits, watch).computed
    assert (later.case.defense.name, later.status) == ("dpsgd", "done")


def test_what_is_not_installed_is_skipped_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "dlgbench[dp]"' in str(why_not(defended(TRAINING, "dpsgd"), Data(None)))
    assert 'pip install "dlgbench[he]"' in str(why_not(defended(TRAINING, "ckks"), Data(None)))
