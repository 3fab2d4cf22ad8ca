"""`Plan`: a TOML file of one grid of cases or several, one table of the benchmark."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from dlgbench.errors import UsageError, unknown
from dlgbench.registry import KINDS, NETWORKS, Value

PROFILES = ("quick", "standard", "paper")
AXES: dict[str, Value] = {
    "network": "", "dataset": "photos", "attack": "dlg", "defense": "none", "dtype": "float32",
    "batch": 0, "resolution": 0, "preparation": "", "classes": 0, "epochs": 0, "starts": 1,
}  # fmt: skip
"""The axes of a grid and their defaults; "" and, but for epochs, 0 leave the choice to the network and the
dataset."""
SIZES = {"images": 1, "seeds": 1, "steps": 300}


@dataclass(frozen=True)
class Grid:
    """``axes`` lists the values of every axis; ``profiles`` say how many images, seeds and steps.

    A size is a number, or a table from network name to number with a ``default``.
    """

    axes: Mapping[str, Sequence[Value]]
    profiles: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Cases of all points of all grids, with the fields in ``pins`` set for every one of them."""

    name: str
    title: str
    grids: Sequence[Grid]
    pins: Mapping[str, Value] = field(default_factory=dict)

    def pin(self, path: str, value: str) -> Plan:
        """This plan with one field (``steps``, ``network.activation``, …) set for every case."""
        known = {*AXES, "image", "seed", *SIZES}
        name, _, option = path.partition(".")
        if name not in known or (option and name not in KINDS):
            raise unknown("field", path, known | {f"{kind}.OPTION" for kind in KINDS})
        return replace(self, pins={**self.pins, path: value})

    def rows(self, profile: str) -> Iterator[dict[str, Any]]:
        """The unresolved cases: one mapping per point of a grid, image and seed."""
        for grid in self.grids:
            sizes = grid.profiles.get(profile, {})
            axes = {axis: grid.axes.get(axis, [default]) for axis, default in AXES.items()}
            axes |= {axis: [value] for axis, value in self.pins.items() if axis in AXES}
            for values in itertools.product(*axes.values()):
                yield from self._point(dict(zip(axes, values, strict=True)), sizes)

    def _point(self, point: Mapping[str, Value], sizes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        network = str(point["network"]).partition(":")[0]
        size = {key: self._size(key, sizes, network) for key in SIZES}
        images = [self._whole("image")] if "image" in self.pins else range(size["images"])
        seeds = [self._whole("seed")] if "seed" in self.pins else range(size["seeds"])
        for image, seed in itertools.product(images, seeds):
            yield {**point, "image": image, "seed": seed, "steps": size["steps"]}

    def _size(self, key: str, sizes: Mapping[str, Any], network: str) -> int:
        if key in self.pins:
            return self._whole(key)
        value = sizes.get(key, SIZES[key])
        if isinstance(value, dict):
            value = value.get(network, value.get("default", SIZES[key]))
        return int(value)

    def _whole(self, key: str) -> int:
        try:
            return int(self.pins[key])
        except ValueError:
            raise UsageError(f"{key}: expected a whole number, got {self.pins[key]!r}") from None


def shipped() -> dict[str, Path]:
    """The plans of the package, by name; the file is read only when it is asked for."""
    folder = files("dlgbench.benchmarks")
    return {
        Path(item.name).stem: Path(str(item))
        for item in sorted(folder.iterdir(), key=lambda i: i.name)
        if item.name.endswith(".toml")
    }


def find(name: str) -> Plan:
    """A plan by its name, or by the path of a TOML file of the user's."""
    known = shipped()
    if name in known:
        return load(known[name])
    if name.endswith(".toml"):
        return load(Path(name))
    raise unknown("plan", name, known)


def load(path: Path) -> Plan:
    """Read a plan; raises UsageError that names the file and what is wrong with it."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"plan {path}: expected a readable TOML file, got {error.strerror}") from None
    except RecursionError:
        raise UsageError(f"plan {path}: expected TOML, got a too deeply nested one") from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        fault = str(error).replace("at end of document", f"at line {len(text.splitlines())}, the end")
        raise UsageError(f"plan {path}: expected TOML, got {fault}") from None
    try:
        return _plan(path.stem, content)
    except UsageError as error:
        raise UsageError(f"plan {path}: {error}") from None


def _plan(name: str, content: dict[str, Any]) -> Plan:
    for key in content:
        if key not in ("title", "grid", *PROFILES):
            raise unknown("table", key, ("title", "grid", *PROFILES))
    grids = content.get("grid", {})
    grids = grids if isinstance(grids, list) else [grids]
    shared = {profile: content.get(profile, {}) for profile in PROFILES}
    _check_profiles(shared)
    return Plan(name, str(content.get("title", name)), [_grid(grid, shared) for grid in grids])


def _grid(content: Any, shared: Mapping[str, Any]) -> Grid:
    """One ``[grid]`` or ``[[grid]]`` with its own profiles, or else those that all grids share."""
    if not isinstance(content, dict) or "network" not in content:
        raise UsageError("expected a table [grid] with at least network = [...]")
    axes = {key: value for key, value in content.items() if key not in PROFILES}
    _check_axes(axes)
    own = {key: value for key, value in content.items() if key in PROFILES}
    _check_profiles(own)
    return Grid(axes, {**shared, **own})


def _check_axes(axes: Mapping[str, Any]) -> None:
    _check_keys("axis of [grid]", axes, AXES)
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"{axis}: expected a list of values, as of every axis of [grid], got {values!r}")
        kind = type(AXES[axis])
        if wrong := [value for value in values if type(value) is not kind]:
            raise UsageError(f"{axis}: expected values of type {kind.__name__}, got {wrong[0]!r}")
    for registry in KINDS.values():
        for text in axes.get(registry.kind, []):
            registry.spec(str(text))


def _check_keys(kind: str, table: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in table:
        if key not in known:
            raise unknown(kind, key, known)


def _check_profiles(profiles: Mapping[str, Any]) -> None:
    for profile, sizes in profiles.items():
        _check_sizes(profile, sizes)


def _check_sizes(profile: str, sizes: Any) -> None:
    if not isinstance(sizes, dict):
        raise UsageError(f"expected [{profile}] to be a table, got {sizes!r}")
    _check_keys(f"size in [{profile}]", sizes, SIZES)
    for key, value in sizes.items():
        if isinstance(value, dict):
            _check_keys(f"network in {profile}.{key}", value, {"default": None, **NETWORKS.entries})
        for number in value.values() if isinstance(value, dict) else [value]:
            least = 1 if key == "steps" else 0  # no image of a network: it is left out
            if type(number) is not int or number < least:
                raise UsageError(f"{profile}.{key}: expected a whole number >= {least}, got {number!r}")
