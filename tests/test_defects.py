"""Sixteen defects found in other projects' code, each of which would fail a test here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from dlgbench.benchmarks.textbook import cross_entropy, model
from torch import Tensor

from dlgbench import leaderboard, trial
from dlgbench.case import Case, stream
from dlgbench.leak import squared_norm
from dlgbench.metrics import assign, fidelity
from dlgbench.optim import LBFGS
from dlgbench.records import Record, decode, encode
from dlgbench.registry import ATTACKS, NETWORKS
from dlgbench.victims import leak_of, network_of, secret_of

from .clients import PHOTOS, case, fitted, leaked

CASE = case(dtype="float32")


def run(one: Case) -> Record:
    return trial.run([one], PHOTOS, trial.Setup("cpu"), lambda step, objective, psnr: None)[0][0]


def test_b1_the_label_reported_is_the_optimised_one() -> None:
    one = replace(CASE, steps=12)
    attack = trial.attack_on([one], network_of(one))
    first = int(attack.dummy_labels[0].argmax())
    record = run(one)
    assert record.images[0]["label_found"] == record.images[0]["label"] != first


@pytest.mark.parametrize("classes", [2, 7, 1000])
def test_b2_images_and_labels_of_any_number_of_classes_share_one_group(classes: int) -> None:
    attack = trial.attack_on([one := replace(CASE, classes=classes)], network_of(one))
    optimizer = attack.configure_optimizers()
    assert isinstance(optimizer, LBFGS)
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [
        (1, 1, 3, 32, 32),
        (1, 1, classes),
    ]
    assert run(one).status == "done"


def test_b3_labels_of_a_batch_are_counted_at_the_right_index() -> None:
    one = replace(
        CASE, batch=4, image=0, attack=ATTACKS.spec("analytic"), steps=1, network=NETWORKS.spec("lenet5")
    )
    network, secret = network_of(one), secret_of(one, PHOTOS)
    secret.labels[0] = torch.tensor([3, 3, 61, 3])
    found = fitted(one, leak_of(one, network, secret)).result.labels[0].argmax(-1)
    assert sorted(found.tolist()) == [3, 3, 3, 61]


def test_b4_the_best_objective_is_that_of_the_image_beside_it() -> None:
    one = replace(CASE, dtype="float64", steps=6)
    leak = leaked(one)
    attack = fitted(one, leak)
    images, labels = attack.result.images[0], attack.result.labels[0].clamp_min(1e-300).log()
    assert float(attack.distance(images, labels, leak.row(0))) == pytest.approx(float(attack.best_objective))


def test_b5_a_trial_that_crashes_stays_in_the_denominator() -> None:
    good, broken = run(CASE), replace(CASE, seed=2)
    failure = Record(case=broken, status="error", reason="out of luck")
    row = leaderboard.rows([good, failure])[0]
    assert (row.trials, row.broken) == (2, 1)


def test_b6_an_image_is_compared_with_its_own_truth_only() -> None:
    truth = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shuffled = truth[[2, 0, 1]]
    rows = fidelity(shuffled[assign(shuffled, truth)], truth)
    assert [row["mse"] for row in rows] == [0, 0, 0]


def test_b7_a_row_of_nan_moves_no_other() -> None:
    def answers(values: Tensor) -> Iterator[float]:
        weights = torch.nn.Parameter(values.clone())
        optimizer = LBFGS([weights], lr=0.5)

        def closure() -> Tensor:
            objective = (weights - torch.arange(3.0)[:, None]).square().sum(1)
            objective[1] *= torch.nan
            weights.grad = torch.autograd.grad(objective.sum(), weights)[0]
            return objective

        optimizer.step(closure)
        yield from weights.detach()[:, 0].tolist()

    first, _, third = answers(torch.full((3, 2), 9.0))
    assert (first, third) == pytest.approx((0, 2), abs=1e-3)


def test_b8_determinism_can_be_demanded() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert run(CASE).status == "done"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "side"), [("lenet_dlg", 32), ("resnet18", 64), ("densenet121", 64)])
def test_b9_client_and_attacker_have_the_same_loss(name: str, side: int) -> None:
    """The client is torch's own modules, cross-entropy of class indices and all."""
    one = case(network=name, batch=2, image=0, resolution=side)
    network, secret = network_of(one), secret_of(one, PHOTOS)
    body = model(name, list(network.parameters())).double()
    loss = cross_entropy(body((secret.images[0] - network.mean) / network.std), secret.labels[0])
    theirs = torch.autograd.grad(loss, list(body.parameters()))
    gradient = dict(zip(dict(network.named_parameters()), theirs, strict=True))
    logits = 1e4 * (torch.nn.functional.one_hot(secret.labels[0], 100).double() - 1)
    attack, leak = trial.attack_on([one], network), leaked(one).row(0)._replace(gradients=gradient)
    distance = float(attack.distance(secret.images[0], logits, leak))
    assert distance < 1e-20 * float(squared_norm(gradient))


def test_b10_two_reconstructions_never_share_one_truth() -> None:
    truth = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert sorted(assign(truth[[0, 0, 0, 0]], truth).tolist()) == [0, 1, 2, 3]


def test_b11_psnr_has_a_range_of_one_and_pixels_not_normalised_ones() -> None:
    truth = torch.full((1, 3, 16, 16), 0.5)
    (row,) = fidelity(truth + 0.1, truth)
    assert row["psnr"] == pytest.approx(20, abs=1e-4)


def test_b12_the_best_iterate_has_the_least_objective_not_the_least_error() -> None:
    attack, truth = trial.attack_on([CASE], network_of(CASE)), secret_of(CASE, PHOTOS).images
    attack.on_train_batch_start(leaked(CASE), 0)
    for objective, image in ((3.0, 0 * truth), (1.0, 0 * truth + 0.5), (2.0, truth)):
        attack.dummy_images.data = image
        attack.keep(torch.tensor([objective]))
    assert (attack.best_images == 0.5).all()
    assert attack.best_objective.tolist() == [1.0]


def test_b13_labels_come_from_the_head_by_name() -> None:
    """Also where the head has no bias, and the last vector is one of batch norm."""
    one = case(network="resnet18", attack="idlg", resolution=64)
    network = network_of(one)
    fc = network.get_submodule("body.fc")
    fc.register_parameter("bias", None)
    leak = leak_of(one, network, secret_of(one, PHOTOS))
    assert list(leak.gradients)[-1] == "body.fc.weight"
    attack = trial.attack_on([one], network)
    with torch.no_grad():
        attack.look(leak)
    assert attack.dummy_labels[0].argmax(1).tolist() == secret_of(one, PHOTOS).labels[0].tolist()


def test_b14_a_first_objective_of_nan_still_ends_in_a_record() -> None:
    one = replace(CASE, steps=3)
    leak = leaked(one)
    broken = leak._replace(gradients={name: g * torch.nan for name, g in leak.gradients.items()})
    assert torch.isnan(fitted(one, broken).result.objective).all()


def test_b15_a_record_holds_its_whole_configuration() -> None:
    record = decode(encode(run(CASE)))
    assert record.case == CASE
    assert record.provenance["versions"]


def test_b16_everything_random_is_seeded_by_the_case() -> None:
    torch.manual_seed(1)
    first = secret_of(CASE, PHOTOS), network_of(CASE)
    torch.manual_seed(2)
    again = secret_of(CASE, PHOTOS), network_of(CASE)
    assert torch.equal(first[0].labels, again[0].labels)
    assert all(map(torch.equal, first[1].parameters(), again[1].parameters()))
    assert stream(CASE, "labels") != stream(replace(CASE, seed=2), "labels")
