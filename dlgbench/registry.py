"""Names, and the factories behind them.

A factory is registered by a decorator and may live in a module that imports torch.  What a user can
ask for (names, options, defaults, choices) is read from the *source* of those modules, so that
``dlgbench list`` and every check of a name answer without importing torch.
"""

from __future__ import annotations

import ast
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from dlgbench.errors import UsageError, unknown

Value = str | int | float | bool
Factory = TypeVar("Factory", bound=Callable[..., Any])
_KINDS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Spec:
    """A name with all its options, such as ``resnet18:activation=relu,batchnorm=train``."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        options = ",".join(f"{key}={_plain(value)}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name

    def get(self, option: str) -> Value | None:
        """The value of ``option``, or None where this entry has no such option."""
        return dict(self.options).get(option)


@dataclass(frozen=True)
class Option:
    """One keyword of a factory: its type, its default (None: required) and its closed choices."""

    name: str
    kind: type
    default: Value | None
    choices: tuple[str, ...] = ()

    def read(self, text: Value) -> Value:
        """``text`` as a value of this option's type."""
        try:
            value = _convert(self.kind, text)
        except ValueError:
            expected = self.kind.__name__
            raise UsageError(f"option {self.name!r}: expected {expected}, got {text!r}") from None
        if self.choices and value not in self.choices:
            raise unknown(f"value of option {self.name!r}", str(value), self.choices)
        return value


@dataclass(frozen=True)
class Entry:
    """What is known of a registered name without running any of its code."""

    name: str
    summary: str
    module: str
    options: Mapping[str, Option]
    facts: Mapping[str, Any]


@dataclass
class Registry:
    """All entries of one kind; ``symbol`` is the name by which the modules decorate with it."""

    kind: str
    module: str
    symbol: str
    factories: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def register(self, name: str, **facts: Any) -> Callable[[Factory], Factory]:
        """Decorate a factory; ``facts`` must be literals, since they are read from the source.

        The fact ``positive`` names the options that must be greater than 0, ``later`` those that an entry
        once lacked, with what it then did: these are no part of a case's identity.
        """

        def remember(factory: Factory) -> Factory:
            if name in self.factories:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self.factories[name] = factory
            return factory

        return remember

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every registered name, in the order of the source."""
        found: dict[str, Entry] = {}
        for module, file in self._sources():
            for entry in self._read(module, file):
                if entry.name in found:
                    raise ValueError(f"{self.kind} {entry.name!r} is registered twice")
                found[entry.name] = entry
        return found

    def entry(self, name: str) -> Entry:
        """The entry called ``name``; raises UsageError with the nearest name."""
        if name not in self.entries:
            raise unknown(self.kind, name, self.entries)
        return self.entries[name]

    def spec(self, text: str) -> Spec:
        """Parse ``name``, ``name:key=value,...`` or ``name:VALUE`` (for an only option)."""
        name, _, rest = text.partition(":")
        entry = self.entry(name)
        return self.complete(name, _split(rest, list(entry.options)))

    def complete(self, name: str, given: Mapping[str, Value]) -> Spec:
        """The spec of ``name`` with every option resolved; raises UsageError on what does not fit."""
        entry = self.entry(name)
        for key in given:
            if key not in entry.options:
                raise unknown(f"option of {self.kind} {name!r}", key, entry.options)
        values: list[tuple[str, Value]] = []
        for key, option in sorted(entry.options.items()):
            value = given.get(key, option.default)
            if value is None:
                raise UsageError(f"{self.kind} {name!r} needs a value: write {name}:{key}=…")
            values.append((key, option.read(value)))
        for key in entry.facts.get("positive", ()):
            if not 0 < float(dict(values)[key]) < math.inf:
                raise UsageError(f"{self.kind} {name!r}: expected {key} > 0, got {dict(values)[key]}")
        return Spec(name, tuple(values))

    def brief(self, spec: Spec) -> str:
        """``spec`` with only those options that are not their defaults, for people to read."""
        known = self.entries[spec.name].options if spec.name in self.entries else {}
        told = tuple(
            (key, value) for key, value in spec.options if key not in known or known[key].default != value
        )
        return str(Spec(spec.name, told))

    def make(self, spec: Spec, *context: Any) -> Any:
        """Import the entry's module and call its factory with ``context`` and the options."""
        importlib.import_module(self.entry(spec.name).module)
        return self.factories[spec.name](*context, **dict(spec.options))

    def _sources(self) -> Iterator[tuple[str, Path]]:
        root = Path(__file__).parent.joinpath(*self.module.split(".")[1:])
        if root.is_dir():
            for file in sorted(root.glob("*.py")):
                yield f"{self.module}.{file.stem}", file
        else:
            yield self.module, root.with_suffix(".py")

    def _read(self, module: str, file: Path) -> Iterator[Entry]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        aliases = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{self.symbol}.register":
                    summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                    facts = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
                    options = {option.name: option for option in _options(node, aliases)}
                    yield Entry(ast.literal_eval(call.args[0]), summary, module, options, facts)


NETWORKS = Registry("network", "dlgbench.networks", "NETWORKS")
DATASETS = Registry("dataset", "dlgbench.datasets", "DATASETS")
DEFENSES = Registry("defense", "dlgbench.defenses", "DEFENSES")
ATTACKS = Registry("attack", "dlgbench.attacks", "ATTACKS")
KINDS = {registry.kind: registry for registry in (NETWORKS, DATASETS, ATTACKS, DEFENSES)}


def _plain(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _convert(kind: type, text: Value) -> Value:
    if kind is bool:
        if str(text).lower() not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[str(text).lower()]
    if kind is int and isinstance(text, float | bool):
        raise ValueError(text)
    value: Value = kind(text)
    if isinstance(value, float) and not math.isfinite(value):  # no record could hold it
        raise ValueError(text)
    return value


def _split(rest: str, options: list[str]) -> dict[str, Value]:
    if not rest:
        return {}
    if len(options) == 1:  # the value may then hold any character, as a path does
        return {options[0]: rest.removeprefix(f"{options[0]}=")}
    given: dict[str, Value] = {}
    for part in rest.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key in given:
            raise UsageError(f"expected options as key=value,key=value, each once; got {rest!r}")
        given[key] = value
    return given


def _options(node: ast.FunctionDef | ast.ClassDef, aliases: Mapping[str, ast.expr]) -> Iterator[Option]:
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not inits:  # a dataclass: its fields are its options
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield _option(item.target.id, item.annotation, item.value, aliases)
            return
        node = inits[0]
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        yield _option(argument.arg, argument.annotation, default, aliases)


def _option(
    name: str, annotation: ast.expr | None, default: ast.expr | None, aliases: Mapping[str, ast.expr]
) -> Option:
    if isinstance(annotation, ast.Name) and annotation.id in aliases:
        annotation = aliases[annotation.id]
    value = None if default is None else ast.literal_eval(default)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return Option(name, str, value, tuple(ast.literal_eval(annotation.slice)))
    kind = _KINDS.get(ast.unparse(annotation) if annotation else "")
    if kind is None:
        raise TypeError(f"option {name!r}: annotate it as int, float, bool, str or Literal[...]")
    return Option(name, kind, value)
