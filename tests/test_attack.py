"""The attack against a bare textbook loop, known answers, and the rule that only gradients choose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from dlgbench.benchmarks.textbook import Textbook, model
from torch import Tensor, nn

from dlgbench import trial
from dlgbench.attacks.base import Task
from dlgbench.attacks.dlg import DLG
from dlgbench.attacks.spectral import Spectral
from dlgbench.callbacks import Guard, Judge
from dlgbench.case import Case, DType, stream
from dlgbench.leak import Leak, gradients, stack
from dlgbench.prepare import Network, probe, replace_activation
from dlgbench.records import Record
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.stochastic import Dropout
from dlgbench.victims import leak_of, network_of, secret_of

from . import clients
from .clients import ATTACKERS

PHOTOS = DATASETS.make(DATASETS.spec("photos"), None)


def case(image: int, seed: int, steps: int, dtype: DType = "float32", attack: str = "dlg") -> Case:
    return Case(
        network=NETWORKS.spec("lenet_dlg"), dataset=DATASETS.spec("photos"), attack=ATTACKS.spec(attack),
        defense=DEFENSES.spec("none"), batch=1, resolution=32, preparation="fit", channels=3, classes=100,
        steps=steps, dtype=dtype, image=image, seed=seed,
    )  # fmt: skip


def run(one: Case, timeout: float = float("inf")) -> Record:
    return together([one], timeout)[0]


def together(cases: Sequence[Case], timeout: float = float("inf")) -> list[Record]:
    setup = trial.Setup("cpu", timeout)
    return [record for record, _ in trial.run(cases, PHOTOS, setup, lambda step, objective, psnr: None)]


def textbook(one: Case) -> Textbook:
    """The same reconstruction as a reader of the paper would write it."""
    weights = list(network_of(one).parameters())
    body, secret = model("lenet_dlg", weights), secret_of(one, PHOTOS)
    target = torch.autograd.grad(F.cross_entropy(body(secret.images[0]), secret.labels[0]), body.parameters())
    generator = torch.Generator().manual_seed(stream(one, "attack"))
    image = torch.randn(1, 3, 32, 32, generator=generator).to(weights[0])
    label = torch.randn(1, 100, generator=generator).to(weights[0])
    return Textbook(body, target, image, label)


@pytest.mark.parametrize(
    ("dtype", "image", "steps", "tolerance"), [("float64", 0, 6, 1e-8), ("float32", 1, 2, 1e-2)]
)  # rounding grows in every one of a step's 20 iterations
def test_loss_history_and_image_are_those_of_the_textbook_loop(
    dtype: DType, image: int, steps: int, tolerance: float
) -> None:
    one = case(image=image, seed=1, steps=steps, dtype=dtype)
    reference = textbook(one)
    losses = [reference.step() for _ in range(steps)]
    network = network_of(one)
    leak = leak_of(one, network, secret_of(one, PHOTOS))
    attack = trial.attack_on([one], network)
    trial.trainer_on("cpu", []).fit(attack, trial.Frozen(leak, steps))
    assert [float(objective) for objective in attack.trace[:-1]] == pytest.approx(losses, rel=tolerance)
    ours, theirs = attack.dummy_images.detach()[0], reference.images.detach()
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    assert int(attack.closures) == reference.closures


def test_a_known_photo_is_recovered_with_its_label() -> None:
    record = run(case(image=1, seed=1, steps=150))
    assert record.status == "done"
    assert record.outcome == "exact"
    assert record.images[0]["psnr"] > 40
    assert record.images[0]["label_found"] == record.images[0]["label"] == 52
    assert record.objective == min(value for value in record.history["objective"] if value is not None)
    assert record.relative is not None
    assert record.relative < 1e-6


@pytest.mark.parametrize("image", range(8))
def test_the_strongest_attack_recovers_every_photo(image: int) -> None:
    record = run(case(image=image, seed=0, steps=1, dtype="float64", attack="spectral"))
    assert record.images[0]["label_found"] == record.images[0]["label"]
    assert record.images[0]["psnr"] > 60


def test_a_diverging_trial_stops_early_and_says_so() -> None:
    # steps of this length leave the pixels' range on every machine; whether usual ones do, rounding decides
    record = run(case(image=0, seed=0, steps=300, attack="dlg:learning_rate=100"))
    assert record.status == "diverged"
    assert record.outcome == "failed"
    assert "diverged" in record.flags
    assert len(record.history["mse"]) < 50
    assert len(record.history["mse"]) == len(record.history["objective"])
    assert record.convergence_step is None


@pytest.mark.parametrize(("seconds", "late"), [(-1.0, True), (float("inf"), False)])
def test_an_attack_can_ask_whether_its_time_is_over(seconds: float, late: bool) -> None:
    one = case(image=0, seed=0, steps=1)
    attack = trial.attack_on([one], network_of(one))
    assert not attack.late()
    Guard(1, seconds).on_train_start(trial.trainer_on("cpu", []), attack)
    assert attack.late() is late


def test_a_trial_out_of_time_is_a_timeout() -> None:
    record = run(case(image=1, seed=1, steps=300), timeout=0.0)
    assert record.status == "timeout"
    assert len(record.history["mse"]) == 2


def test_a_trial_that_raises_becomes_a_record_of_its_failure() -> None:
    record = run(broken_case())
    assert record.status == "error"
    assert record.reason
    assert record.broken


def broken_case() -> Case:
    """A case whose defense does not exist: it passes no check of names, so it can only come from code."""
    whole = case(image=0, seed=0, steps=1)
    return Case(**{**vars(whole), "defense": NETWORKS.spec("lenet5")})


def test_the_result_depends_on_the_case_alone() -> None:
    one = case(image=2, seed=3, steps=4)
    torch.manual_seed(1)
    first = run(one)
    torch.manual_seed(2)
    torch.rand(5)
    second = run(one)
    assert first.history == second.history
    assert first.images == second.images


@pytest.mark.parametrize("name", ATTACKERS)
def test_the_attack_stays_the_same_when_the_secret_changes_after_the_leak(name: str) -> None:
    one = case(image=1, seed=1, steps=2, attack=name)
    results = []
    for tamper in (False, True):
        network, secret = network_of(one), secret_of(one, PHOTOS)
        leak = leak_of(one, network, secret)
        if tamper:
            secret.images.zero_()
            secret.labels.zero_()
        attack = trial.attack_on([one], network)
        trial.trainer_on("cpu", []).fit(attack, trial.Frozen(leak, one.steps))
        results.append(attack.result)
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].labels, results[1].labels)


@pytest.mark.parametrize("wide", [False, True])
def test_a_trial_does_not_depend_on_its_batch_mates(wide: bool) -> None:
    """To rounding, whose growth in 40 iterations the tolerance allows for."""
    cases = [case(image=i, seed=s, steps=2, dtype="float64") for i, s in [(1, 1), (0, 1), (4, 5)]]
    others = [case(image=i, seed=s, steps=2, dtype="float64") for i, s in [(3, 1), (4, 4)]]
    batch = together([*others, *cases] if wide else cases)[-3:]
    for record, one in zip(batch, cases, strict=True):
        alone = run(one)
        assert record.case == alone.case
        assert record.closures == alone.closures
        assert record.history["objective"] == pytest.approx(alone.history["objective"], rel=1e-6)
        assert record.images[0]["mse"] == pytest.approx(alone.images[0]["mse"], rel=1e-6)


def test_a_row_that_ends_leaves_the_others_running() -> None:
    cases = [case(image=i, seed=1, steps=5) for i in (3, 1)]
    network, secrets = network_of(cases[0]), [secret_of(one, PHOTOS) for one in cases]
    lost, sound = (leak_of(one, network, secret) for one, secret in zip(cases, secrets, strict=True))
    attack, judge, guard = trial.attack_on(cases, network), Judge(secrets, 5), Guard(2, 60)
    trial.trainer_on("cpu", [judge, guard]).fit(attack, trial.Frozen(stack([poisoned(lost), sound]), 5))
    assert guard.verdicts == ["diverged", None]
    assert [len(one.history["mse"]) for one in judge.cases] == [2, 6]
    assert int(attack.closures[0]) < int(attack.closures[1])
    assert float(attack.trace[-1][1]) < float(attack.trace[0][1])


def poisoned(leak: Leak) -> Leak:
    """What no dummy data have a finite objective against."""
    return leak._replace(gradients={name: tensor * torch.nan for name, tensor in leak.gradients.items()})


@pytest.mark.parametrize("known", [True, False])
def test_an_attacker_draws_the_masks_it_was_not_given(known: bool) -> None:
    layer = Dropout(0.5)
    network = Network(nn.Sequential(nn.Flatten(), layer, nn.Linear(12, 3)))
    layer.shape = torch.Size((1, 12))
    mask = network.draw_masks(1, torch.Generator().manual_seed(7)) if known else {}
    weights = {name: tensor.detach()[None] for name, tensor in network.named_parameters()}
    leak = Leak(weights, {name: tensor[None] for name, tensor in mask.items()}, weights)
    attack = DLG(network, Task(1, 3, 2, 2, 3, [torch.Generator().manual_seed(0)]))
    dummies = attack.dummy_images.detach(), attack.dummy_labels.detach()
    values = [float(attack.evaluate(*dummies, leak).objective) for _ in range(6)]
    assert (len(set(values)) == 1) is known


def test_a_nan_objective_ends_the_trial() -> None:
    one = case(image=1, seed=1, steps=5)
    network = network_of(one)
    leak = leak_of(one, network, secret_of(one, PHOTOS))
    attack, judge, guard = (
        trial.attack_on([one], network),
        Judge([secret_of(one, PHOTOS)], 5),
        Guard(1, 60),
    )
    trial.trainer_on("cpu", [judge, guard]).fit(attack, trial.Frozen(poisoned(leak), one.steps))
    assert guard.verdicts == ["diverged"]
    assert len(attack.trace) == 2  # the start, and the point to which its first step leads
    assert torch.equal(attack.result.images, attack.best_images)


def with_masks(labels: list[int], given: bool) -> tuple[Spectral, Leak, Tensor, Tensor]:
    """An attack that has looked at two images' leak, the images, and the mask that their client drew."""
    layers = nn.Flatten(), nn.Linear(12, 40), nn.ReLU(), nn.Identity(), nn.Linear(40, 3)
    network = Network(replace_activation(nn.Sequential(*layers), "sigmoid"))
    network.set_submodule("body.3", Dropout(0.5))
    probe(network, (2, 3, 2, 2))
    weights = {name: tensor.detach() for name, tensor in network.named_parameters()}
    images = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    mask = network.draw_masks(2, torch.Generator().manual_seed(2))
    shared = gradients(network, weights, mask, images, F.one_hot(torch.tensor(labels), 3).float())
    parts = weights, mask if given else {}, shared
    leak = Leak(*({name: t[None] for name, t in part.items()} for part in parts))
    attack = Spectral(network, Task(2, 3, 2, 2, 3, [torch.Generator().manual_seed(0)]))
    with torch.no_grad():
        attack.look(leak)
    return attack, leak, images, mask["body.3.mask"]


@pytest.mark.parametrize(("labels", "told"), [([0, 2], True), ([2, 2], False)])
def test_the_strongest_attack_reads_masks_that_it_was_not_given(labels: list[int], told: bool) -> None:
    attack, leak, _, mask = with_masks(labels, given=False)
    seen = [attack.seen(leak, [0]).buffers["body.3.mask"][0] for _ in range(2)]
    assert torch.equal(seen[0], mask) is told
    assert torch.equal(*seen) is told
    assert not math.isnan(float(seen[0].sum()))


def test_a_call_that_is_filled_up_draws_what_its_own_cases_draw() -> None:
    one = clients.case(network="lenet_dlg", defense="precode:units=16", image=0)
    leak = stack([clients.leaked(one)] * 2)
    drawn = []
    for rows, wanted in (([0], None), ([0, 0], 1)):
        attack = trial.attack_on([one, one], network_of(one))
        drawn.append([attack.seen(leak, rows, wanted).buffers for _ in range(2)][-1])
    for name, mask in drawn[0].items():
        assert torch.equal(drawn[1][name], torch.cat([mask, mask]))


@pytest.mark.parametrize("labels", [[0, 2], [2, 0], [1, 1]])
def test_labels_go_with_the_masks_that_are_given(labels: list[int]) -> None:
    """The private images have no distance only if every one has its own label and its own mask."""
    attack, leak, images, _ = with_masks(labels, given=True)
    assert attack.dummy_labels[0].argmax(1).tolist() == labels
    assert float(attack.distance(images, attack.dummy_labels[0].detach(), leak.row(0))) < 1e-9


def test_a_layer_that_shared_nothing_leaves_the_rest_of_the_gradient_sound() -> None:
    one = clients.case(attack="spectral")
    leak = clients.leaked(one)
    silent = leak._replace(gradients={**leak.gradients, "body.0.weight": 0 * leak.gradients["body.0.weight"]})
    attack = trial.attack_on([one], network_of(one))
    values = attack.evaluate(attack.dummy_images.detach(), attack.dummy_labels.detach(), silent)
    assert all(part.isfinite().all() for part in values)
    assert values.images.any()
