"""Whole trials in double precision, of batches and with batch norm; and the tests' own guard."""

from __future__ import annotations

import math
import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlgbench import trial
from dlgbench.attacks.base import Attack, Reconstruction
from dlgbench.callbacks import Guard, Judge
from dlgbench.case import Case
from dlgbench.datasets import Dataset
from dlgbench.leak import Secret
from dlgbench.records import Record, decode, encode
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.scoring import score
from dlgbench.victims import leak_of, network_of, secret_of

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


def scored(secret: Secret, images: Tensor, labels: Tensor) -> Record:
    """The record of an attack that found ``images`` and ``labels`` in this order."""
    found = Reconstruction(images, F.one_hot(labels, BATCH.classes).float(), torch.zeros(1), torch.zeros(1))
    trace, closures = [torch.ones(1), torch.zeros(1)], torch.tensor([2])
    attack = SimpleNamespace(result=found, trace=trace, closures=closures)
    judge = Judge([secret], steps=1)
    judge.cases[0].history = {"mse": [1.0, 0.0], "psnr": [0.0, 160.0], "ssim": [0.0, 1.0]}
    return score(BATCH, cast(Attack, attack), judge, 0, None)


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
