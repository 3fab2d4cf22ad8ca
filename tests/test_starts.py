"""Several starts of one attack: the one whose objective ends lowest counts, all of them cost."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from dlgbench import trial
from dlgbench.attacks.base import Attack
from dlgbench.callbacks import Screen, lowest
from dlgbench.case import Case
from dlgbench.leak import stack
from dlgbench.trial import Setup
from dlgbench.victims import network_of
from tests.clients import PHOTOS, case, leaked

STARTS = 3


def run(*cases: Case) -> list[trial.Trial]:
    return trial.run(cases, PHOTOS, Setup("cpu"), lambda *progress: None)


def test_the_lowest_objective_counts_and_all_closures_cost(attacks: list[Attack]) -> None:
    cases = [case(steps=20, starts=STARTS, image=image) for image in (1, 2)]
    records = [record for record, _ in run(*cases)]
    objectives = attacks[0].result.objective.view(2, STARTS)
    for record, own, closures in zip(records, objectives, attacks[0].closures.view(2, STARTS), strict=True):
        assert len(set(own.tolist())) == STARTS
        assert record.objective == pytest.approx(float(own.nan_to_num(nan=torch.inf).min()))
        assert record.closures == int(closures.sum())


def test_the_first_start_is_the_only_one_of_old(attacks: list[Attack]) -> None:
    run(case(steps=2, starts=STARTS))
    run(case(steps=2))
    several, alone = (attack.result.images for attack in attacks)
    assert len(alone) == 1
    torch.testing.assert_close(several[0], alone[0], rtol=1e-6, atol=1e-8)
    assert not torch.allclose(several[1], alone[0])


def test_a_case_with_starts_is_another_than_without() -> None:
    assert case(starts=2).id != case().id
    assert case(starts=1).id == case().id


def test_after_a_tenth_of_the_steps_the_best_goes_on_alone(attacks: list[Attack]) -> None:
    ((record, _),) = run(case(steps=20, starts=STARTS, attack="idlg"))
    closures = attacks[0].closures
    early = torch.stack(attacks[0].trace)[1]  # the objective that was known when two steps had ended
    assert int(closures.argmax()) == int(early.nan_to_num(nan=torch.inf).argmin())
    assert closures.sort().values[-2] <= 2 * 20
    assert closures.max() > 10 * 20
    assert record.status == "done"


def test_what_a_guard_has_stopped_is_not_the_start_that_goes_on() -> None:
    one = case(starts=STARTS)
    attack = trial.attack_on([one], network_of(one))
    attack.trace.append(torch.tensor([0.1, 0.3, 0.2]))
    attack.active[0] = False  # the lowest has blown up an instant ago
    Screen(STARTS, after=1).on_train_batch_end(trial.trainer_on("cpu", []), attack, None, None, 0)
    assert attack.active.tolist() == [False, False, True]


def test_under_adam_too_what_has_stopped_stays_where_it_is() -> None:
    one = case(steps=20, starts=STARTS, attack="inverting_gradients:iterations=2")
    attack = trial.attack_on([one], network_of(one))
    leak = stack([leaked(one)] * STARTS)
    places = list[torch.Tensor]()

    class Note(pl.Callback):
        def on_train_batch_end(self, *told: Any) -> None:
            places.append(attack.dummy_images.detach().clone())

    trial.trainer_on("cpu", [Note(), Screen(STARTS, after=3)]).fit(attack, trial.Frozen(leak, one.steps))
    moved = (places[-1] != places[2]).flatten(1).any(1).tolist()
    assert sum(moved) == 1
    assert attack.closures[moved.index(True)] > attack.closures.sort().values[-2]


def test_six_starts_find_what_one_mostly_does_not() -> None:
    """Plain DLG on its home ground: of 24 cases one start recovered 7 in as many steps."""
    ((record, _),) = run(case(image=4, steps=120, starts=6))
    assert record.images[0]["psnr"] > 30


def test_a_start_without_a_number_is_never_the_lowest() -> None:
    nan = float("nan")
    assert lowest(torch.tensor([nan, 2.0, 1.0, 5.0, nan, nan]), 3) == [2, 3]
    assert lowest(torch.tensor([3.0, 1.0]), 1) == [0, 1]
