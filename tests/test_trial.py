"""Whole trials in double precision, of batches and with batch norm; and the tests' own guard."""

from __future__ import annotations

import io
import math
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from skimage import metrics as scikit
from torch import Tensor

from dlgbench import processes, runner, trial
from dlgbench.attacks.base import Attack, Reconstruction
from dlgbench.callbacks import Guard, Judge
from dlgbench.case import Case
from dlgbench.datasets import Dataset
from dlgbench.display import display
from dlgbench.grid import Data
from dlgbench.leak import Secret
from dlgbench.records import COMPARED, Record, Status, decode, encode
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.scoring import score
from dlgbench.store import Store
from dlgbench.victims import leak_of, network_of, secret_of

SCIKIT: Any = scikit  # it has no annotations
CASE = Case(
    network=NETWORKS.spec("lenet_dlg"), dataset=DATASETS.spec("photos"), attack=ATTACKS.spec("dlg"),
    defense=DEFENSES.spec("none"), batch=1, resolution=32, preparation="fit", channels=3, classes=100,
    steps=4, dtype="float32", image=1, seed=1,
)  # fmt: skip
DOUBLE, BATCH = replace(CASE, dtype="float64"), replace(CASE, batch=2)


@pytest.fixture(scope="module")
def photos() -> Dataset:
    made: Dataset = DATASETS.make(CASE.dataset, None)
    return made


def run(case: Case, photos: Dataset, timeout: float = float("inf")) -> Record:
    setup = trial.Setup("cpu", timeout)
    return trial.run([case], photos, setup, lambda step, objective, psnr: None)[0][0]


def test_a_trial_in_double_precision_is_double_throughout(photos: Dataset, attacks: list[Attack]) -> None:
    record = run(DOUBLE, photos)
    (attack,) = attacks
    tensors = (attack.dummy_images, attack.dummy_labels, attack.best_objective, *attack.result)
    assert {tensor.dtype for tensor in tensors} == {torch.float64}
    assert record.status == "done", record.reason
    assert decode(encode(record)) == record
    assert record.history["objective"] != run(CASE, photos).history["objective"]


def test_what_is_sought_before_the_first_step_shows(photos: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attack, "look", lambda attack, leak: attack.tell(0.5))
    shown: list[tuple[int, float, float]] = []
    trial.run([CASE], photos, trial.Setup("cpu", 60), lambda *told: shown.append(told))
    assert shown[0][:2] == (0, 0.5)
    assert math.isnan(shown[0][2])  # no PSNR
    assert [step for step, *_ in shown] == [0, 1, 2, 3, 4]


def test_a_batch_has_one_entry_per_image(photos: Dataset) -> None:
    record = run(BATCH, photos)
    assert record.status == "done", record.reason
    assert [image["label"] for image in record.images] == secret_of(BATCH, photos).labels[0].tolist()
    assert {len(rows) for rows in record.baselines.values()} == {2}
    assert {len(values) for values in record.history.values()} == {BATCH.steps + 1}
    assert decode(encode(record)) == record


def test_what_is_found_of_a_large_dataset_is_ranked(photos: Dataset) -> None:
    dlg, digits = ATTACKS.spec("dlg:iterations=5"), DATASETS.spec("digits")
    case = replace(CASE, dataset=digits, attack=dlg, channels=1, classes=10, steps=1)
    record = run(case, DATASETS.make(digits, None))
    assert record.status == "done", record.reason
    assert [1 <= image["rank"] <= COMPARED for image in record.images] == [True]
    assert decode(encode(record)) == record
    assert "rank" not in run(CASE, photos).images[0]  # eight are too few


def scored(secret: Secret, images: Tensor, labels: Tensor) -> Record:
    """The record of an attack that found ``images`` and ``labels`` in this order."""
    found = Reconstruction(images, F.one_hot(labels, BATCH.classes).float(), torch.zeros(1), torch.zeros(1))
    trace, closures = [torch.ones(1), torch.zeros(1)], torch.tensor([2])
    attack = SimpleNamespace(result=found, trace=trace, closures=closures)
    judge = Judge([secret], steps=1)
    judge.cases[0].history = {"mse": [1.0, 0.0], "psnr": [0.0, 160.0], "ssim": [0.0, 1.0]}
    return score(BATCH, cast(Attack, attack), judge, 0, None, {})


def test_images_in_another_order_keep_their_labels(photos: Dataset) -> None:
    secret = secret_of(BATCH, photos)
    first, second = secret.labels[0].tolist()
    assert first != second
    record = scored(secret, secret.images.flip(1), secret.labels.flip(1))
    assert [image["outcome"] for image in record.images] == ["exact", "exact"]
    assert [image["label_found"] for image in record.images] == [first, second]
    assert record.outcome == "exact"
    crossed = scored(secret, secret.images.flip(1), secret.labels)
    assert [image["outcome"] for image in crossed.images] == ["exact", "exact"]
    assert [image["label"] for image in crossed.images] == [first, second]
    assert [image["label_found"] for image in crossed.images] == [second, first]


def test_one_image_found_twice_counts_once(photos: Dataset) -> None:
    secret = secret_of(BATCH, photos)
    record = scored(secret, secret.images[:, [1, 1]], secret.labels[:, [1, 1]])
    assert [image["outcome"] == "exact" for image in record.images] == [False, True]
    assert record.outcome != "exact"


@pytest.mark.filterwarnings("ignore:Found 20 module.* in eval mode")  # meant: running statistics are used
def test_an_attack_leaves_running_statistics_and_weights_alone(photos: Dataset) -> None:
    dlg = ATTACKS.spec("dlg:iterations=5")
    case = replace(BATCH, network=NETWORKS.spec("resnet18:batchnorm=eval"), attack=dlg, steps=2)
    network = network_of(case)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    leak = leak_of(case, network, secret_of(case, photos))
    shared = {name: tensor.clone() for name, tensor in leak.buffers.items()}
    attack = trial.attack_on([case], network)
    trial.trainer_on("cpu", []).fit(attack, trial.Frozen(leak, case.steps))
    assert len(attack.trace) == 3
    assert sum(name.endswith("running_var") for name in shared) == 20
    assert all(torch.equal(leak.buffers[name], tensor) for name, tensor in shared.items())
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_trial_out_of_time_is_broken(photos: Dataset) -> None:
    record = run(CASE, photos, timeout=0.0)
    assert (record.status, record.broken) == ("timeout", True)


def test_a_trial_that_diverges_out_of_time_has_diverged(photos: Dataset) -> None:
    network, guard = network_of(CASE), Guard(1, 0.0)
    leak = leak_of(CASE, network, secret_of(CASE, photos))
    leak = leak._replace(gradients={name: value * torch.nan for name, value in leak.gradients.items()})
    trial.trainer_on("cpu", [guard]).fit(trial.attack_on([CASE], network), trial.Frozen(leak, CASE.steps))
    assert guard.verdicts == ["diverged"]


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])
@pytest.mark.parametrize("call", ["connect", "connect_ex"])
def test_no_test_reaches_the_network(host: str, call: str) -> None:
    with socket.socket() as client, pytest.raises(pytest.fail.Exception, match="tried to reach the network"):
        getattr(client, call)((host, 80))


def test_loopback_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def flags_of(images: Tensor, labels: Tensor, relative: float, trace: list[float]) -> tuple[str, ...]:
    """Of an attack that found ``images`` of a secret with ``labels``, by way of these objectives."""
    secret = secret_of(BATCH, DATASETS.make(CASE.dataset, None))
    secret.labels[0] = labels
    found = Reconstruction(
        images.expand_as(secret.images), F.one_hot(labels, BATCH.classes).float()[None], torch.zeros(1),
        torch.tensor([relative]),
    )  # fmt: skip
    objectives = [torch.tensor([value]) for value in trace]
    attack = SimpleNamespace(result=found, trace=objectives, closures=torch.tensor([2]))
    judge = Judge([secret], steps=len(trace) - 1)
    judge.cases[0].history = {name: [1.0] * len(trace) for name in ("mse", "psnr", "ssim")}
    return score(BATCH, cast(Attack, attack), judge, 0, None, {}).flags


FALLING, ONE, OTHER = [3.0, 2.0, 1.0], torch.tensor([4, 5]), torch.tensor([4, 4])


@pytest.mark.parametrize(
    ("labels", "relative", "trace", "flags"),
    [
        (ONE, 1e-3, FALLING, set()),
        (ONE, 0.9e-4, FALLING, {"matched-but-wrong"}),
        (ONE, 1.1e-4, FALLING, set()),
        (OTHER, 1e-3, FALLING, {"duplicate-labels"}),
        (ONE, 1e-3, [*range(20, 0, -1), 1.0, 1.0], {"stalled"}),
        (ONE, 1e-3, [*range(20, 0, -1), 1.0, 0.9], set()),
    ],
)
def test_what_went_wrong_is_flagged(
    labels: Tensor, relative: float, trace: list[float], flags: set[str]
) -> None:
    assert set(flags_of(torch.tensor(0.5), labels, relative, trace)) == flags


def test_a_recovered_image_is_not_matched_but_wrong(photos: Dataset) -> None:
    assert flags_of(secret_of(BATCH, photos).images, ONE, 0.0, FALLING) == ()


class Note(pl.Callback):
    """The dummies before the training and after every step."""

    def __init__(self) -> None:
        self.dummies: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, attack: pl.LightningModule) -> None:
        assert isinstance(attack, Attack)
        self.dummies.append(attack.dummy_images.detach().clone())

    def on_train_batch_end(self, trainer: pl.Trainer, attack: pl.LightningModule, *told: object) -> None:
        self.on_train_start(trainer, attack)


def test_every_iterate_is_measured_in_pixels_against_its_own_image(photos: Dataset) -> None:
    network, secret = network_of(BATCH), secret_of(BATCH, photos)
    note, judge = Note(), Judge([secret], BATCH.steps)
    attack = trial.attack_on([BATCH], network)
    leak = leak_of(BATCH, network, secret)
    trial.trainer_on("cpu", [judge, note]).fit(attack, trial.Frozen(leak, BATCH.steps))
    truth = secret.images[0].numpy()
    for step, dummies in enumerate(note.dummies):
        pixels = (dummies[0] * network.std + network.mean).clamp(0, 1).numpy()
        orders = ([0, 1], [1, 0])
        best = min((pixels[order] for order in orders), key=lambda some: float(((some - truth) ** 2).mean()))
        pairs = list(zip(best, truth, strict=True))
        expected = {
            "mse": [SCIKIT.mean_squared_error(a, b) for a, b in pairs],
            "psnr": [SCIKIT.peak_signal_noise_ratio(b, a, data_range=1) for a, b in pairs],
        }
        for name, values in expected.items():
            assert judge.cases[0].history[name][step] == pytest.approx(sum(values) / 2, rel=1e-4)
    assert len(note.dummies) == len(judge.cases[0].history["mse"]) == BATCH.steps + 1


def test_the_pictures_of_a_trial_are_its_own(photos: Dataset, attacks: list[Attack]) -> None:
    """Of two cases of two images each, by what the attack and the clients hold."""
    cases = [BATCH, replace(BATCH, image=2)]
    trials = trial.run(cases, photos, trial.Setup("cpu"), lambda *progress: None)
    for row, (case, (_, packed)) in enumerate(zip(cases, trials, strict=True)):
        drawn, truth = np.load(io.BytesIO(packed)), secret_of(case, photos).images[0]
        found = attacks[0].result.images[row].clamp(0, 1)
        crossed = float((found.flip(0) - truth).square().sum()) < float((found - truth).square().sum())
        for name, images in (("private", truth), ("reconstruction", found.flip(0) if crossed else found)):
            pixels = (255 * images).round().permute(0, 2, 3, 1).numpy()
            np.testing.assert_array_equal(drawn[name][0], pixels)
        assert drawn["evolution"].shape[1:] == drawn["private"].shape[1:]
        assert drawn["steps"].tolist()[:: len(drawn["steps"]) - 1] == [0, case.steps]


@pytest.mark.parametrize(
    ("error", "status"),
    [(MemoryError(), "oom"), (torch.OutOfMemoryError(), "oom"), (IndexError("out of luck"), "error"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom")],
)  # fmt: skip
def test_what_breaks_a_trial_is_recorded(
    error: Exception, status: str, photos: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(trial, "network_of", broken)
    monkeypatch.setattr(trial, "trained_network_of", broken)
    record = run(CASE, photos)
    assert (record.status, record.broken) == (status, True)
    assert type(error).__name__ in record.reason


def test_a_record_tells_what_the_attack_presumes_and_how_exact_it_was(photos: Dataset) -> None:
    torch.backends.cudnn.allow_tf32 = True
    told = run(CASE, photos).provenance
    assert told["labels"] == ATTACKS.entry("dlg").facts["labels"]
    assert (told["weights"], told["tf32"], told["cudnn_deterministic"]) == ("untrained", False, True)
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("name", ["digits", "mnist_sample"])
def test_a_client_has_the_classes_of_its_images(name: str) -> None:
    data = DATASETS.make(DATASETS.spec(name), None)
    case = replace(CASE, dataset=DATASETS.spec(name), channels=1, classes=10, batch=5, image=3)
    assert secret_of(case, data).labels[0].tolist() == [data.label(index) for index in range(15, 20)]


def test_a_batch_that_one_case_crashes_is_halved_until_the_others_have_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cases = [replace(CASE, seed=seed) for seed in range(5)]
    batches = list[int]()

    def crash(batch: Sequence[Case], *rest: object) -> list[trial.Trial]:
        batches.append(len(batch))
        if cases[3] in batch and len(batch) > 1:
            raise trial.BatchFailed
        status: Status = "error" if cases[3] in batch else "done"
        return [(Record(case=case, status=status), b"") for case in batch]

    monkeypatch.setattr(processes, "run", crash)
    monkeypatch.setattr(processes, "batch_size", lambda case, device: 5)
    store = Store(tmp_path)
    store.prepare()
    watch = display(Console(file=io.StringIO()), 5)
    found = runner.run(cases, store, Data(None), trial.Setup("cpu"), runner.Limits(), watch).computed
    assert [(r.case.seed, r.status) for r in found] == [(s, "error" if s == 3 else "done") for s in range(5)]
    assert batches == [5, 3, 2, 1, 1]
    assert store.load(cases)[0].keys() == {case.id for case in cases}
