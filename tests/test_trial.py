"""Whole trials in double precision, of batches and with batch norm; and the tests' own guard."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlgbench import trial
from dlgbench.attacks.base import Attack, Reconstruction
from dlgbench.callbacks import Guard, Judge
from dlgbench.case import Case, stream
from dlgbench.datasets import Dataset
from dlgbench.leak import Secret
from dlgbench.prepare import Network
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


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> list[Attack]:
    """Every attack that a trial makes."""
    made: list[Attack] = []
    real = trial.attack_on

    def attack_on(case: Case, network: Network) -> Attack:
        made.append(real(case, network))
        return made[-1]

    monkeypatch.setattr(trial, "attack_on", attack_on)
    return made


def run(case: Case, photos: Dataset, timeout: float = float("inf")) -> Record:
    return trial.run(case, photos, trial.Setup("cpu", timeout), lambda step, objective, psnr: None)[0]


def textbook(case: Case, photos: Dataset) -> list[float]:
    """The objectives of deep leakage in double precision: plain modules, autograd and torch's L-BFGS."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5, padding=2, stride=2), nn.Sigmoid(), nn.Conv2d(12, 12, 5, padding=2, stride=2),
        nn.Sigmoid(), nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(768, 100),
    ).double()  # fmt: skip
    model.load_state_dict(dict(zip(model.state_dict(), network_of(case).parameters(), strict=True)))
    secret, parameters = secret_of(case, photos), list(model.parameters())
    target = torch.autograd.grad(F.cross_entropy(model(secret.images[0]), secret.labels[0]), parameters)
    generator = torch.Generator().manual_seed(stream(case, "attack"))
    image = torch.randn(1, 3, 32, 32, generator=generator).double().requires_grad_()
    label = torch.randn(1, 100, generator=generator).double().requires_grad_()
    optimizer = torch.optim.LBFGS([image, label], lr=1, max_iter=20, history_size=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(image), label.softmax(-1))
        ours = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(ours, target, strict=True)]).sum()
        torch.autograd.backward(distance, inputs=[image, label])
        return distance.detach()

    step: Callable[..., Tensor] = optimizer.step
    return [float(step(closure)) for _ in range(case.steps)] + [float(closure())]


def test_a_trial_in_double_precision_equals_the_textbook_loop(photos: Dataset, attacks: list[Attack]) -> None:
    record = run(DOUBLE, photos)
    (attack,) = attacks
    tensors = (attack.dummy_images, attack.dummy_labels, attack.best_objective, *attack.result)
    assert {tensor.dtype for tensor in tensors} == {torch.float64}
    assert record.status == "done", record.reason
    assert decode(encode(record)) == record
    assert record.history["objective"] == pytest.approx(textbook(DOUBLE, photos), rel=1e-10, abs=0)
    assert record.history["objective"] != run(CASE, photos).history["objective"]


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
    attack = SimpleNamespace(result=found, trace=[torch.ones(1), torch.zeros(1)], closures=2)
    judge = Judge(secret, steps=1)
    judge.history = {"mse": [1.0, 0.0], "psnr": [0.0, 160.0], "ssim": [0.0, 1.0]}
    return score(BATCH, cast(Attack, attack), judge, None)


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
    attack = trial.attack_on(case, network)
    trial.trainer_on("cpu", None, []).fit(attack, trial.Frozen(leak, case.steps))
    assert len(attack.trace) == 3
    assert sum(name.endswith("running_var") for name in shared) == 20
    assert all(torch.equal(leak.buffers[name], tensor) for name, tensor in shared.items())
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_trial_out_of_time_is_broken(photos: Dataset) -> None:
    record = run(CASE, photos, timeout=0.0)
    assert (record.status, record.broken) == ("timeout", True)


def test_a_trial_that_diverges_out_of_time_has_diverged(photos: Dataset) -> None:
    network, guard = network_of(CASE), Guard(0.0)
    leak = leak_of(CASE, network, secret_of(CASE, photos))
    leak = leak._replace(gradients={name: value * torch.nan for name, value in leak.gradients.items()})
    trial.trainer_on("cpu", None, [guard]).fit(trial.attack_on(CASE, network), trial.Frozen(leak, CASE.steps))
    assert guard.verdict == "diverged"


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])
@pytest.mark.parametrize("call", ["connect", "connect_ex"])
def test_no_test_reaches_the_network(host: str, call: str) -> None:
    with socket.socket() as client, pytest.raises(pytest.fail.Exception, match="tried to reach the network"):
        getattr(client, call)((host, 80))


def test_loopback_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
