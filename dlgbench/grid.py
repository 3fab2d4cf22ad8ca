"""Plans and filters → the cases of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dlgbench import networks, utility, victims
from dlgbench.case import Case
from dlgbench.datasets import PREPARATIONS, Dataset
from dlgbench.defenses import Defense
from dlgbench.errors import Unsuitable, UsageError, unknown
from dlgbench.images import digest
from dlgbench.plan import Plan
from dlgbench.records import Manifest
from dlgbench.registry import ATTACKS, DATASETS, DEFENSES, KINDS, NETWORKS, Spec
from dlgbench.trial import most_closures

MOST_EVALUATIONS = 1.25
"""Closures in a step of L-BFGS at most, of its iterations: there torch stops."""


class Data:
    """The datasets of a run, each opened once, and digests of what is taken of them."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._open: dict[Spec, Dataset] = {}
        self._images: dict[tuple[Spec, int], str] = {}

    def __call__(self, spec: Spec) -> Dataset:
        if spec not in self._open:
            self._open[spec] = DATASETS.make(spec, self.root)
        return self._open[spec]

    def digest(self, case: Case) -> str:
        """A digest of all that the case takes of its dataset: the private images as decoded, and of files
        of the user's, which may change, their classes and whatever else a network is trained on.

        Raises UsageError where an image is missing or cannot be read.
        """
        dataset, private = self(case.dataset), victims.indices(case)
        if private.stop > len(dataset):
            raise UsageError(
                f"dataset {case.dataset}: expected at least {private.stop} images, got {len(dataset)}; "
                "ask for fewer images or a smaller batch"
            )
        if "packaged" in DATASETS.entry(case.dataset.name).facts:
            return "-".join(self._image(case.dataset, index) for index in private)
        taken = range(len(dataset)) if case.epochs or case.trains else private
        told = [(self._image(case.dataset, index), dataset.label(index)) for index in taken]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def _image(self, spec: Spec, index: int) -> str:
        if (spec, index) not in self._images:
            self._images[spec, index] = digest(self(spec).image(index))
        return self._images[spec, index]


def manifest(plan: Plan, profile: str, only: Mapping[str, Sequence[str]], data: Data) -> Manifest:
    """The cases of ``plan`` whose every field in ``only`` has one of the values given for it.

    Raises UsageError for whatever a user could have got wrong, before anything is computed.
    """
    _check_names(only)
    cases = tuple(dict.fromkeys(_cases(plan, profile, only, data)))
    for case in cases:
        why_not(case, data)  # factories check what names and types cannot tell
    return Manifest(plan.name, plan.title, profile, cases)


def why_not(case: Case, data: Data) -> str | None:
    """Why this case cannot be run, or None."""
    if case.classes < 2:
        return "with one class the loss is always 0, and so is the gradient"
    known = data(case.dataset).classes
    if known is not None and known > case.classes:
        return f"{case.dataset} has {known} classes, more than the network's {case.classes}"
    if (case.epochs or case.trains) and known is None:
        return f"{case.dataset} has no classes to train for: epochs must be 0, and attack not none"
    if case.epochs and len(data(case.dataset)) <= case.batch:
        return f"{case.dataset} has no images but the private ones to train on: epochs must be 0"
    if case.trains:
        trained, tested = utility.sizes(len(data(case.dataset)))
        if trained < case.batch or tested < 1:
            return f"{case.dataset} has too few images for batches of {case.batch} and a fifth to test on"
    defense: Defense = DEFENSES.make(case.defense)
    if case.batch < defense.least:
        return f"{case.defense} needs a batch of {defense.least} images or more, got {case.batch}"
    if refused := defense.refusal(case.trains):
        return f"{case.defense}: {refused}"
    return _refusal(case.network, case.shape, case.classes, case.defense)


def most_seconds(case: Case) -> float:
    """An upper estimate on two CPU cores, from the network's time per closure at its own size."""
    facts = NETWORKS.entry(case.network.name).facts
    if case.trains:
        return float(case.steps) * float(facts["closure_seconds"])
    size = case.batch * case.resolution**2 / (facts["batch"] * facts["resolution"] ** 2)
    closures = case.starts * (case.ahead + MOST_EVALUATIONS * most_closures(case))
    return float(closures * facts["closure_seconds"] * max(size, 0.5))


def _check_names(only: Mapping[str, Sequence[str]]) -> None:
    for path, values in only.items():
        kind, _, option = path.partition(".")
        if option and kind in KINDS:
            known = {name for entry in KINDS[kind].entries.values() for name in entry.options}
            if option not in known:
                raise unknown(f"option of a {kind}", option, known)
        for value in values if path in KINDS else ():
            (KINDS[path].spec if ":" in value else KINDS[path].entry)(value)


def _cases(plan: Plan, profile: str, only: Mapping[str, Sequence[str]], data: Data) -> Iterator[Case]:
    for row in plan.rows(profile):
        if _named(row, only):  # first, since --set may name options that other networks lack
            case = _resolve(plan, row, data)
            if all(_matches(case, path, values) for path, values in only.items()):
                yield case


def _named(row: Mapping[str, Any], only: Mapping[str, Sequence[str]]) -> bool:
    return all(
        str(row[kind]).partition(":")[0] in [value.partition(":")[0] for value in only[kind]]
        for kind in KINDS
        if kind in only
    )


def _matches(case: Case, path: str, values: Sequence[str]) -> bool:
    value = case.get(path)
    if path in KINDS:
        spec = getattr(case, path)
        return any(text == spec.name or (":" in text and KINDS[path].spec(text) == spec) for text in values)
    return value is not None and any(_same(value, text) for text in values)


def _same(value: object, text: str) -> bool:
    if isinstance(value, float):
        try:
            return value == float(text)
        except ValueError:
            return False
    return str(value).lower() == text.lower()


def _resolve(plan: Plan, row: Mapping[str, Any], data: Data) -> Case:
    """The case of one row: what the plan leaves open is filled by the network and the dataset."""
    specs: dict[str, Any] = {kind: _spec(plan, kind, str(row[kind])) for kind in KINDS}
    dataset, facts = data(specs["dataset"]), NETWORKS.entry(specs["network"].name).facts
    preparation = row["preparation"] or facts["preparation"]
    if preparation not in PREPARATIONS:
        raise unknown("preparation", preparation, PREPARATIONS)
    case = Case(
        **specs,
        batch=_number(row, "batch") or facts["batch"],
        resolution=_number(row, "resolution") or facts["resolution"],
        preparation=preparation,
        channels=facts["channels"] or dataset.channels,
        classes=_number(row, "classes") or dataset.classes or facts["classes"],
        epochs=_number(row, "epochs"),
        starts=_number(row, "starts"),
        steps=min(row["steps"], ATTACKS.entry(specs["attack"].name).facts.get("steps", row["steps"])),
        **{name: row[name] for name in ("dtype", "image", "seed")},
    )
    return replace(case, data=data.digest(case))


def _spec(plan: Plan, kind: str, text: str) -> Spec:
    spec = KINDS[kind].spec(text)
    pinned = {
        path.partition(".")[2]: value for path, value in plan.pins.items() if path.startswith(f"{kind}.")
    }
    return KINDS[kind].complete(spec.name, {**dict(spec.options), **pinned}) if pinned else spec


def _number(row: Mapping[str, Any], key: str) -> int:
    try:
        return int(str(row[key]))
    except ValueError:
        raise UsageError(f"{key}: expected a whole number, got {row[key]!r}") from None


@cache
def _refusal(network: Spec, shape: tuple[int, int, int, int], classes: int, defense: Spec) -> str | None:
    try:
        networks.check(network, shape, classes, DEFENSES.make(defense).protect)
    except Unsuitable as reason:
        return str(reason)
    return None
