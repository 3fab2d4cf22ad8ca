"""What the tests of attacks share: clients with photos, what they leak, and attacks that have run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dlgbench import trial
from dlgbench.attacks.base import Attack
from dlgbench.attacks.spectral import Spectral
from dlgbench.case import Case
from dlgbench.leak import Leak
from dlgbench.registry import ATTACKS, DATASETS, KINDS
from dlgbench.victims import leak_of, network_of, secret_of

ATTACKERS = [name for name, entry in ATTACKS.entries.items() if "trains" not in entry.facts]
PHOTOS = DATASETS.make(DATASETS.spec("photos"), None)
USUAL: dict[str, Any] = {
    "network": "lenet_dlg", "dataset": "photos", "attack": "dlg", "defense": "none", "batch": 1,
    "resolution": 32, "preparation": "fit", "channels": 3, "classes": 100, "steps": 2, "dtype": "float64",
    "image": 1, "seed": 0,
}  # fmt: skip


def case(**changes: Any) -> Case:
    """The usual case but for ``changes``; networks, attacks and so on by their names."""
    values = USUAL | changes
    values |= {kind: registry.spec(values[kind]) for kind, registry in KINDS.items()}
    return Case(**values)


def leaked(one: Case) -> Leak:
    return leak_of(one, network_of(one), secret_of(one, PHOTOS))


def fitted(one: Case, leak: Leak) -> Attack:
    attack = trial.attack_on([one], network_of(one))
    trial.trainer_on("cpu", []).fit(attack, trial.Frozen(leak, one.steps))
    return attack


def several(count: int) -> Spectral:
    """`spectral` on so many photos of 128 px, before it has looked at what their clients leak."""
    cases = [case(attack="spectral", network="resnet18", resolution=128, image=i) for i in range(count)]
    attack = trial.attack_on(cases, network_of(cases[0]))
    assert isinstance(attack, Spectral)
    return attack


def error(found: Tensor, truth: Tensor) -> float:
    """The mean squared error."""
    return float((found - truth).square().mean())
