"""`Case`, one reconstruction in plain values, and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

from dlgbench.errors import UsageError, unknown
from dlgbench.registry import ATTACKS, KINDS, Spec, Value

PROTOCOL = 3
"""Part of every case's identity: raise it when the same case would give other numbers.

Where these are the cases of one attack only, raise the ``revision`` that it is registered with: a number,
or a table from ``FIELD=VALUE``, several with commas, to number with a ``default``: the first that holds.
"""

DType = Literal["float32", "float64"]
_POSITIVE = ("batch", "resolution", "classes", "steps", "starts")
_NATURAL = ("image", "seed", "epochs")
_LATER = {"epochs": 0, "starts": 1}
"""Fields that cases once lacked, with what they then meant: no part of the identity."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that determines a reconstruction, and nothing else.

    ``image`` counts batches of the dataset from 0; ``resolution`` is in pixels; ``channels`` is 1 or
    3; ``steps`` are steps of the attack's optimiser.
    """

    network: Spec
    dataset: Spec
    attack: Spec
    defense: Spec
    batch: int
    resolution: int
    preparation: str
    channels: int
    classes: int
    steps: int
    dtype: DType
    image: int
    seed: int
    data: str = ""
    """A digest of the private images as decoded, and of all else that is taken of files which may change."""
    epochs: int = 0
    """How many times the network has been trained on all other images of the dataset; 0 is untrained."""
    starts: int = 1
    """From how many starts the attack is run; what counts is the one whose objective ends lowest."""

    def __post_init__(self) -> None:
        for name, least in [(n, 1) for n in _POSITIVE] + [(n, 0) for n in _NATURAL]:
            if getattr(self, name) < least:
                raise UsageError(f"{name}: expected a whole number >= {least}, got {getattr(self, name)}")
        if self.dtype not in get_args(DType):
            raise unknown("dtype", self.dtype, get_args(DType))

    @property
    def trains(self) -> bool:
        """Whether nobody attacks: clients train for ``steps`` updates of ``batch`` images on average."""
        return self._says("trains")

    @property
    def adapts(self) -> bool:
        """Whether the attack knows the defence and its options."""
        return self._says("adaptive")

    def _says(self, fact: str) -> bool:
        attack = ATTACKS.entries.get(self.attack.name)  # records of other versions may name others
        return attack is not None and fact in attack.facts

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the private images, ``(image, channel, height, width)``."""
        return self.batch, self.channels, self.resolution, self.resolution

    @property
    def id(self) -> str:
        """The content hash that names the record: 16 hexadecimal digits."""
        content = json.dumps([PROTOCOL, self.identity(), *self._revision()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _revision(self) -> list[int]:
        found = self._number("revision")
        return [] if found is None else [found]

    @property
    def ahead(self) -> int:
        """In how many closures' time the attack is ready for its first step, at most."""
        return self._number("ahead") or 0

    def _number(self, fact: str) -> int | None:
        """What the attack says of this case: a number, or one for each of some fields' values."""
        attack = ATTACKS.entries.get(self.attack.name)  # records of other versions may name others
        found: int | dict[str, int] | None = attack.facts.get(fact) if attack else None
        if isinstance(found, dict):
            told = (number for where, number in found.items() if self._holds(where))
            return next(told, found.get("default"))
        return found

    def _holds(self, where: str) -> bool:
        pairs = [part.partition("=") for part in where.split(",")]
        return all(equals and str(self.get(path)) == value for path, equals, value in pairs)

    def identity(self) -> dict[str, Any]:
        """`plain` without what cases once lacked, where it has the value that was meant then."""
        plain = {key: value for key, value in self.plain().items() if _LATER.get(key) != value}
        for kind, registry in KINDS.items():
            entry = registry.entries.get(plain[kind]["name"])
            later = entry.facts.get("later", {}) if entry else {}
            plain[kind] = {key: value for key, value in plain[kind].items() if later.get(key) != value}
        return plain

    def plain(self) -> dict[str, Any]:
        """The case as JSON values; `from_plain` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: {"name": value.name, **dict(value.options)} if isinstance(value, Spec) else value
            for key, value in values.items()
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Case:
        """Raises TypeError, ValueError or KeyError where ``plain`` is not what `plain` returns."""
        values = dict(plain)
        for kind in KINDS:
            options = dict(values[kind])
            values[kind] = Spec(options.pop("name"), tuple(sorted(options.items())))
        case = cls(**values)
        for field in fields(case):
            wanted = (
                Spec
                if field.name in KINDS
                else str
                if field.name in ("preparation", "dtype", "data")
                else int
            )
            if type(getattr(case, field.name)) is not wanted:
                raise TypeError(f"{field.name}: expected {wanted.__name__}")
        return case

    def get(self, path: str) -> Value:
        """The value of a field such as ``seed``, ``network`` (its name) or ``network.activation``."""
        name, _, option = path.partition(".")
        if name not in {field.name for field in fields(self)}:
            raise unknown("field", name, (field.name for field in fields(self)))
        value = getattr(self, name)
        if isinstance(value, Spec):
            return cast(Value, value.get(option)) if option else value.name
        return cast(Value, value)


def stream(case: Case, purpose: str) -> int:
    """A seed of 63 bits for one purpose of one case, independent of all other purposes.

    It depends on the case's ``seed`` and ``image`` alone, so that cases that differ in anything else
    meet the same weights, labels and starts: a comparison is paired.
    """
    digest = hashlib.sha256(f"{case.seed}/{case.image}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
