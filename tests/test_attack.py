"""The attack against a bare textbook loop, known answers, and the rule that only gradients choose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlgbench import trial
from dlgbench.attacks.base import Task
from dlgbench.attacks.dlg import DLG
from dlgbench.callbacks import Guard, Judge
from dlgbench.case import Case, DType, stream
from dlgbench.leak import Leak
from dlgbench.prepare import Dropout, Network
from dlgbench.records import Record
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, NETWORKS
from dlgbench.victims import leak_of, network_of, secret_of

PHOTOS = DATASETS.make(DATASETS.spec("photos"), None)


def case(image: int, seed: int, steps: int, dtype: DType = "float32", attack: str = "dlg") -> Case:
    return Case(
        network=NETWORKS.spec("lenet_dlg"), dataset=DATASETS.spec("photos"), attack=ATTACKS.spec(attack),
        defense=DEFENSES.spec("none"), batch=1, resolution=32, preparation="fit", channels=3, classes=100,
        steps=steps, dtype=dtype, image=image, seed=seed,
    )  # fmt: skip


def run(one: Case, timeout: float = float("inf")) -> Record:
    setup = trial.Setup("cpu", timeout)
    return trial.run(one, PHOTOS, setup, lambda step, objective, psnr: None)[0]


def textbook(one: Case) -> tuple[list[float], Tensor]:
    """Deep leakage as a reader of the paper would write it: plain modules, autograd and torch's L-BFGS."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5, padding=2, stride=2), nn.Sigmoid(), nn.Conv2d(12, 12, 5, padding=2, stride=2),
        nn.Sigmoid(), nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(768, 100),
    )  # fmt: skip
    model.load_state_dict(dict(zip(model.state_dict(), network_of(one).parameters(), strict=True)))
    secret, parameters = secret_of(one, PHOTOS), list(model.parameters())
    target = torch.autograd.grad(F.cross_entropy(model(secret.images[0]), secret.labels[0]), parameters)
    generator = torch.Generator().manual_seed(stream(one, "attack"))
    image = torch.randn(1, 3, 32, 32, generator=generator).requires_grad_()
    label = torch.randn(1, 100, generator=generator).requires_grad_()
    optimizer = torch.optim.LBFGS([image, label], lr=1, max_iter=20, history_size=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(image), label.softmax(-1))
        ours = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(ours, target, strict=True)]).sum()
        torch.autograd.backward(distance, inputs=[image, label])
        return distance.detach()

    step: Callable[..., Tensor] = optimizer.step
    losses = [float(step(closure)) for _ in range(one.steps)]
    return losses, image.detach()


def test_loss_history_and_image_equal_the_textbook_loop_bit_for_bit() -> None:
    one = case(image=1, seed=1, steps=12)
    losses, image = textbook(one)
    network = network_of(one)
    leak = leak_of(one, network, secret_of(one, PHOTOS))
    attack = trial.attack_on(one, network)
    trial.trainer_on("cpu", None, []).fit(attack, trial.Frozen(leak, one.steps))
    assert [float(objective) for objective in attack.trace[:-1]] == losses
    assert torch.equal(attack.dummy_images.detach()[0], image)


def test_a_known_photo_is_recovered_with_its_label() -> None:
    record = run(case(image=1, seed=1, steps=150))
    assert record.status == "done"
    assert record.outcome == "exact"
    assert record.images[0]["psnr"] > 40
    assert record.images[0]["label_found"] == record.images[0]["label"] == 52
    assert record.objective == min(value for value in record.history["objective"] if value is not None)
    assert record.relative is not None
    assert record.relative < 1e-6


def test_a_diverging_trial_stops_early_and_says_so() -> None:
    record = run(case(image=0, seed=0, steps=300))
    assert record.status == "diverged"
    assert record.outcome == "failed"
    assert "diverged" in record.flags
    assert len(record.history["mse"]) < 50
    assert len(record.history["mse"]) == len(record.history["objective"])
    assert record.convergence_step is None


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


def test_the_attack_stays_the_same_when_the_secret_changes_after_the_leak() -> None:
    one = case(image=1, seed=1, steps=3)
    results = []
    for tamper in (False, True):
        network, secret = network_of(one), secret_of(one, PHOTOS)
        leak = leak_of(one, network, secret)
        if tamper:
            secret.images.zero_()
            secret.labels.zero_()
        attack = trial.attack_on(one, network)
        trial.trainer_on("cpu", None, []).fit(attack, trial.Frozen(leak, one.steps))
        results.append(attack.result)
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].labels, results[1].labels)


def test_rows_of_a_batch_of_cases_are_independent() -> None:
    cases = [case(image=0, seed=0, steps=1), case(image=1, seed=1, steps=1)]
    network = network_of(cases[0])
    leaks = [leak_of(one, network_of(one), secret_of(one, PHOTOS)) for one in cases]
    both = Leak(
        *(
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*leaks, strict=True)
        )
    )
    generators = [torch.Generator().manual_seed(stream(one, "attack")) for one in cases]
    wide = DLG(network, Task(*cases[0].shape, 100, generators))
    together = wide.objectives(wide.dummy_images, wide.dummy_labels, both)
    for row, leak in enumerate(leaks):
        generator = torch.Generator().manual_seed(stream(cases[row], "attack"))
        alone = DLG(network, Task(*cases[0].shape, 100, [generator]))
        assert torch.equal(together[row], alone.objectives(alone.dummy_images, alone.dummy_labels, leak)[0])


@pytest.mark.parametrize("known", [True, False])
def test_an_attacker_draws_the_masks_it_was_not_given(known: bool) -> None:
    layer = Dropout(0.5)
    network = Network(nn.Sequential(nn.Flatten(), layer, nn.Linear(12, 3)))
    layer.shape = torch.Size((1, 12))
    mask = network.draw_masks(torch.Generator().manual_seed(7)) if known else {}
    weights = {name: tensor.detach()[None] for name, tensor in network.named_parameters()}
    leak = Leak(weights, {name: tensor[None] for name, tensor in mask.items()}, weights)
    attack = DLG(network, Task(1, 3, 2, 2, 3, [torch.Generator().manual_seed(0)]))
    dummies = attack.dummy_images.detach(), attack.dummy_labels.detach()
    values = [float(attack.objectives(*dummies, leak)) for _ in range(6)]
    assert (len(set(values)) == 1) is known


def test_a_nan_objective_ends_the_trial() -> None:
    one = case(image=1, seed=1, steps=5)
    network = network_of(one)
    leak = leak_of(one, network, secret_of(one, PHOTOS))
    poisoned = leak._replace(gradients={k: v * torch.nan for k, v in leak.gradients.items()})
    attack, judge, guard = (
        trial.attack_on(one, network),
        Judge(secret_of(one, PHOTOS), 5),
        Guard(60),
    )
    trial.trainer_on("cpu", None, [judge, guard]).fit(attack, trial.Frozen(poisoned, one.steps))
    assert guard.verdict == "diverged"
    assert len(attack.trace) == 2  # the start, and the point to which its first step leads
    assert torch.equal(attack.result.images, attack.best_images)
