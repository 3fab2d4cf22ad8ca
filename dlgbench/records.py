"""`Record`: what happened to one case, as a strict JSON file named by the case's content hash."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from dlgbench.case import Case
from dlgbench.errors import UsageError

Status = Literal["done", "diverged", "timeout", "oom", "error", "skipped"]
SCHEMA = 1
COMPARED = 1000
"""How many images of a dataset, its first, what was found is ranked among."""


class Damaged(ValueError):
    """A record file that does not hold what was written into it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One trial.  Numbers that are undefined are None; nothing is ever NaN or infinite.

    ``images`` and ``baselines`` hold one mapping of metrics per private image, the first with the labels
    and, of large datasets, the ``rank`` (`lineup.ranks`) of what was found; ``outcome`` is that of the worst
    image of the batch, ``objective`` is re-evaluated at the returned iterate, ``relative`` is the squared
    gradient distance there over the squared norm of the leaked gradient.  ``history`` has one entry per
    iterate, the start included: its metrics are of what was drawn, its objective is of what an attack has
    made of that before its first step.
    """

    case: Case
    status: Status
    reason: str = ""
    outcome: str = "failed"
    flags: tuple[str, ...] = ()
    images: tuple[dict[str, Any], ...] = ()
    baselines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    objective: float | None = None
    relative: float | None = None
    convergence_step: int | None = None
    closures: int = 0
    history: dict[str, list[float | None]] = field(default_factory=dict)
    utility: dict[str, Any] = field(default_factory=dict)
    """Where nobody attacks: the accuracy of what was trained, and the cost of an update."""
    cost: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Whether the trial could not be run to a result; a diverged attack *is* a result."""
        return self.status in ("timeout", "oom", "error")


def encode(record: Record) -> str:
    """Strict JSON with a digest of its content; raises ValueError for NaN or infinity."""
    values = {name: getattr(record, name) for name in _names()} | {"case": record.case.plain()}
    body = {"schema": SCHEMA, "id": record.case.id, **values}
    return json.dumps({"digest": _digest(body), **body}, indent=1, allow_nan=False) + "\n"


def decode(text: str) -> Record:
    """The inverse of `encode`; raises `Damaged` with what is wrong."""
    try:
        body = json.loads(text, parse_constant=_refuse)
        digest, schema, identity = body.pop("digest"), body.pop("schema"), body.pop("id")
        if schema != SCHEMA:
            raise Damaged(f"expected schema {SCHEMA}, got {schema!r}")
        if digest != _digest({"schema": schema, "id": identity, **body}):
            raise Damaged("its content does not match its digest")
        case = Case.from_plain(body.pop("case"))
        record = Record(case=case, **{**body, "flags": tuple(body["flags"]), "images": tuple(body["images"])})
    except Damaged:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None
    if identity != case.id or record.status not in get_args(Status):
        raise Damaged("its id or status is not what its content says")
    return record


def save(record: Record, folder: Path) -> Path:
    """Write the record so that, whatever happens, the file is whole or absent."""
    path = folder / f"{record.case.id}.json"
    write(path, encode(record).encode())
    return path


def write(path: Path, content: bytes) -> None:
    """Write a file atomically and durably: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def load(path: Path) -> Record:
    """Read one record; raises `Damaged`, also where the file's name is not the record's."""
    try:
        record = decode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(str(error)) from None
    if path.stem != record.case.id:
        raise Damaged(f"its name should be {record.case.id}.json")
    return record


def load_all(folder: Path, ids: Iterable[str] | None = None) -> tuple[dict[str, Record], dict[Path, str]]:
    """The sound records by id, and the damaged files with what is wrong with each."""
    paths = sorted(folder.glob("*.json")) if ids is None else [folder / f"{i}.json" for i in ids]
    sound: dict[str, Record] = {}
    damaged: dict[Path, str] = {}
    for path in paths:
        if path.exists():
            try:
                sound[path.stem] = load(path)
            except Damaged as error:
                damaged[path] = str(error)
    return sound, damaged


@dataclass(frozen=True)
class Manifest:
    """Which cases one run set out to do: what makes a table complete or partial."""

    plan: str
    title: str
    profile: str
    cases: tuple[Case, ...]

    @property
    def ids(self) -> list[str]:
        """The cases' ids, in order."""
        return [case.id for case in self.cases]

    @property
    def name(self) -> str:
        """``plan-profile-hash``, the hash of the ids: another selection is another table."""
        return f"{self.plan}-{self.profile}-{hashlib.sha256(' '.join(self.ids).encode()).hexdigest()[:8]}"

    @property
    def heading(self) -> str:
        """What stands above its tables."""
        return f"{self.title} ({self.profile} profile)"

    def save(self, folder: Path) -> None:
        """Write it to ``folder/name.json``."""
        body = {
            "plan": self.plan,
            "title": self.title,
            "profile": self.profile,
            "cases": [case.plain() for case in self.cases],
        }
        write(folder / f"{self.name}.json", (json.dumps(body, indent=1) + "\n").encode())


def manifests(folder: Path) -> list[Manifest]:
    """Every manifest in ``folder``, by name; raises UsageError for a damaged one."""
    return [_manifest(path) for path in sorted(folder.glob("*.json"))]


def _manifest(path: Path) -> Manifest:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{**body, "cases": tuple(map(Case.from_plain, body["cases"]))})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: expected the manifest of a run, got {error}; run its plan again") from None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def finite(value: float) -> float | None:
    """``value``, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None


def _names() -> list[str]:
    return [item.name for item in fields(Record)]


def _digest(body: Mapping[str, Any]) -> str:
    content = json.dumps(body, sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _refuse(constant: str) -> None:
    raise Damaged(f"expected finite numbers, got {constant}")
