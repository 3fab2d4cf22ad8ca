"""Names, options and specs: what is read from the source is what the code is."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlgbench.errors import UsageError
from dlgbench.registry import (
    ATTACKS,
    DATASETS,
    DEFENSES,
    KINDS,
    NETWORKS,
    Entry,
    Option,
    Registry,
    Spec,
    Value,
)

NAMES = [(registry.kind, name) for registry in KINDS.values() for name in registry.entries]
TOYS = '''
from typing import Literal
Colour = Literal["red", "green"]

def not_registered(*, x: complex = 1j): ...

@TOYS.register("one", size=3, unit="px")
def one(context, *, path: str):
    """A toy with one
    option.

    And a story.
    """

@TOYS.register("many")
class Many:
    def __init__(self, context, *, flag: bool = False, count: int = 3, rate: float = 0.1,
                 colour: Colour = "red", word: str = "w"): ...

@TOYS.register("data")
@dataclass
class Data:
    width: int
    colour: Literal["red", "green"] = "green"
'''


class Made(NamedTuple):
    """What a decorator was told when its module really ran."""

    factory: Callable[..., Any]
    facts: dict[str, Any]


@dataclasses.dataclass
class ToyRegistry(Registry):
    """A registry whose only module is a file of the test."""

    file: Path = Path()

    def _sources(self) -> Iterator[tuple[str, Path]]:
        yield self.module, self.file


@pytest.fixture
def toys(tmp_path: Path) -> Registry:
    return toy_registry(tmp_path, TOYS)


def toy_registry(folder: Path, source: str) -> Registry:
    file = folder / "toys.py"
    file.write_text(source)
    return ToyRegistry("toy", "toys", "TOYS", file=file)


def modules(registry: Registry) -> list[str]:
    package = importlib.import_module(registry.module)
    inside = pkgutil.iter_modules(getattr(package, "__path__", []), f"{registry.module}.")
    return [registry.module, *(module.name for module in inside)]


def copy_name(module: str) -> str:
    return f"copy_of_{module}".replace(".", "_")


def run_copies(registry: Registry) -> dict[str, Made]:
    """Execute copies of the registry's modules and note what they register."""
    found: dict[str, Made] = {}

    def spy(_: Registry, name: str, **facts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def note(factory: Callable[..., Any]) -> Callable[..., Any]:
            found[name] = Made(factory, facts)
            return factory

        return note

    with pytest.MonkeyPatch.context() as patch:
        names = modules(registry)
        patch.setattr(Registry, "register", spy)
        for name in names:
            origin = importlib.util.find_spec(name)
            assert origin is not None
            spec = importlib.util.spec_from_file_location(copy_name(name), str(origin.origin))
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)  # where dataclass looks for it
            spec.loader.exec_module(module)
    return found


def options_of(factory: Callable[..., Any]) -> dict[str, Option]:
    """The options as Python itself tells them."""
    fields = dataclasses.is_dataclass(factory)  # of a dataclass every parameter is an option
    found = {}
    for name, parameter in inspect.signature(factory, eval_str=True).parameters.items():
        if fields or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            closed = get_origin(parameter.annotation) is Literal
            default = None if parameter.default is inspect.Parameter.empty else parameter.default
            choices = get_args(parameter.annotation) if closed else ()
            found[name] = Option(name, str if closed else parameter.annotation, default, choices)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_is_read_as_python_runs_it(kind: str) -> None:
    made = run_copies(KINDS[kind])
    assert made
    assert made.keys() == KINDS[kind].entries.keys()  # in whatever order modules were imported
    for name, entry in KINDS[kind].entries.items():
        factory, facts = made[name]
        assert entry.options == options_of(factory)
        assert entry.facts == facts
        assert entry.summary == (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ") != ""
        assert copy_name(entry.module) == factory.__module__


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_what_must_be_positive_is_an_option(kind: str, name: str) -> None:
    entry = KINDS[kind].entry(name)
    for key in entry.facts.get("positive", ()):
        assert entry.options[key].kind in (int, float)
        for value in (0, -1):
            with pytest.raises(UsageError, match=f"{key} > 0, got {value}"):
                KINDS[kind].complete(name, {key: value})


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_options_leave_room_for_the_name(kind: str, name: str) -> None:
    """A case's JSON holds an entry's name beside its options."""
    assert "name" not in KINDS[kind].entry(name).options


def test_names_are_read_without_importing_torch() -> None:
    code = (
        "import sys; from dlgbench.registry import KINDS\n"
        "assert all(registry.entries for registry in KINDS.values())\n"
        "KINDS['network'].spec('resnet18:activation=relu')\n"
        "assert not {'torch', 'torchvision', 'numpy', 'pytorch_lightning', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_toys_are_read_from_source(toys: Registry) -> None:
    colours = ("red", "green")
    assert list(toys.entries) == ["one", "many", "data"]
    assert toys.entry("one").options == {"path": Option("path", str, None)}
    assert toys.entry("one").facts == {"size": 3, "unit": "px"}
    assert toys.entry("one").summary.split() == ["A", "toy", "with", "one", "option."]
    assert toys.entry("many").options == {
        "flag": Option("flag", bool, False), "count": Option("count", int, 3),
        "rate": Option("rate", float, 0.1), "colour": Option("colour", str, "red", colours),
        "word": Option("word", str, "w")}  # fmt: skip
    assert toys.entry("data").options == {
        "width": Option("width", int, None),
        "colour": Option("colour", str, "green", colours),
    }


# Specs


def value_of(option: Option, alone: bool, positive: bool) -> st.SearchStrategy[Value]:
    if option.choices:
        return st.sampled_from(option.choices)
    if option.kind is str:  # among others a comma separates options, and blanks around a value are dropped
        return st.text() if alone else st.text().filter(lambda text: "," not in text and text == text.strip())
    if option.kind is float:
        least = 0 if positive else None
        return st.floats(least, allow_nan=False, allow_infinity=False, exclude_min=positive)
    return st.integers(1 if positive else None) if option.kind is int else st.booleans()


def some_options(entry: Entry) -> st.SearchStrategy[dict[str, Value]]:
    alone = len(entry.options) == 1
    values = {
        name: value_of(option, alone, name in entry.facts.get("positive", ()))
        for name, option in entry.options.items()
    }
    required = {name: values.pop(name) for name, option in entry.options.items() if option.default is None}
    return st.fixed_dictionaries(required, optional=values)


def check_round_trip(registry: Registry, name: str, data: st.DataObject) -> None:
    given_options = data.draw(some_options(registry.entry(name)))
    spec = registry.complete(name, given_options)
    assert registry.spec(str(spec)) == spec
    assert registry.spec(registry.brief(spec)) == spec
    assert set(dict(spec.options)) == set(registry.entry(name).options)
    assert all(spec.get(key) == value for key, value in given_options.items())
    assert {type(value) for key, value in spec.options} <= {
        o.kind for o in registry.entry(name).options.values()
    }


@pytest.mark.parametrize(("kind", "name"), NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_spec_is_read_back_from_its_text(kind: str, name: str, data: st.DataObject) -> None:
    check_round_trip(KINDS[kind], name, data)


@pytest.mark.parametrize("name", ["one", "many", "data"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_toys_spec_is_read_back_from_its_text(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    check_round_trip(toy_registry(tmp_path_factory.getbasetemp(), TOYS), name, data)


@pytest.mark.parametrize("path", ["a,b=c:d", "path=x", "path=", "C:\\x", "/a b/", " x ", "a=1,a=2"])
def test_an_only_option_may_hold_any_sign(path: str) -> None:
    spec = DATASETS.complete("folder", {"path": path})
    assert spec.get("path") == path
    assert DATASETS.spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("clip", Spec("clip", (("bound", 1.0),))),
        ("clip:0.5", Spec("clip", (("bound", 0.5),))),
        ("clip:bound=5e-1", Spec("clip", (("bound", 0.5),))),
        ("noise:std=5e-1", Spec("noise", (("rounds", 1), ("std", 0.5)))),
        ("none", Spec("none")),
        ("none:", Spec("none")),
    ],
)
def test_short_forms(text: str, spec: Spec) -> None:
    assert DEFENSES.spec(text) == spec


def test_an_options_order_does_not_matter() -> None:
    one, other = (
        NETWORKS.spec(f"resnet18:{text}")
        for text in ("activation=relu,batchnorm=eval", " batchnorm = eval , activation = relu")
    )
    assert one == other
    assert str(one) == "resnet18:activation=relu,batchnorm=eval,init=default"
    assert one.get("dropout") is None


@pytest.mark.parametrize(("text", "flag"), [("true", True), ("False", False), ("TRUE", True), (False, False)])
def test_booleans_are_words(toys: Registry, text: Value, flag: bool) -> None:
    assert toys.complete("many", {"flag": text}).get("flag") is flag
    assert f"flag={str(flag).lower()}" in str(toys.complete("many", {"flag": text}))


def test_a_whole_number_serves_as_a_float() -> None:
    value = DEFENSES.complete("noise", {"std": 1}).get("std")
    assert (value, type(value)) == (1.0, float)


# Refusals


def refused(call: Callable[[], object], *words: str) -> None:
    """``call`` must raise a UsageError of one line that holds ``words``."""
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("registry", "text", "words"),
    [
        (
            NETWORKS,
            "resnet81",
            ["unknown network 'resnet81'", "densenet121, inception_v3", "mean 'resnet18'"],
        ),
        (NETWORKS, "", ["unknown network ''", "lenet5"]),
        (ATTACKS, "dgl", ["unknown attack 'dgl'", "did you mean 'dlg'"]),
        (NETWORKS, "resnet18:activaton=relu", ["'resnet18'", "'activaton'", "did you mean 'activation'"]),
        (NETWORKS, "lenet5:batchnorm=eval", ["'lenet5'", "'batchnorm'", "activation, init"]),
        (NETWORKS, "resnet18:activation=sigmiod", ["'activation'", "'sigmiod'", "did you mean 'sigmoid'"]),
        (NETWORKS, "resnet18:relu", ["key=value", "'relu'"]),
        (NETWORKS, "resnet18:init=default,init=default", ["each once"]),
        (ATTACKS, "dlg:history=1.5", ["'history'", "expected int", "'1.5'"]),
        (ATTACKS, "dlg:learning_rate=fast", ["'learning_rate'", "expected float", "'fast'"]),
        (DATASETS, "folder", ["'folder' needs a value", "folder:path="]),
        (DATASETS, "samples:cifar11", ["'cifar11'", "did you mean 'cifar10'"]),
    ],
)
def test_what_does_not_fit_is_named_with_its_neighbour(
    registry: Registry, text: str, words: list[str]
) -> None:
    refused(lambda: registry.spec(text), *words)


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("flag", "yes", "bool"),
        ("flag", 1, "bool"),
        ("count", 2.0, "int"),
        ("count", True, "int"),
        ("count", "", "int"),
        ("rate", "", "float"),
    ],
)
def test_values_of_another_type_are_refused(toys: Registry, option: str, value: Value, kind: str) -> None:
    refused(lambda: toys.complete("many", {option: value}), f"'{option}'", f"expected {kind}")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("option", ["learning_rate", "tolerance_change"])
def test_numbers_that_no_record_can_hold_are_refused(option: str, text: str) -> None:
    refused(lambda: ATTACKS.spec(f"dlg:{option}={text}"), option, "expected")


def test_a_brief_spec_tells_only_what_differs() -> None:
    spec = NETWORKS.spec("resnet18:activation=relu")
    assert NETWORKS.brief(spec) == "resnet18:activation=relu"
    assert NETWORKS.brief(NETWORKS.spec("resnet18")) == "resnet18"
    gone = Spec("gone", (("depth", 3),))  # an entry of an older release, in a record
    assert NETWORKS.brief(gone) == "gone:depth=3"


def test_blanks_do_not_hide_a_repeated_option() -> None:
    refused(lambda: NETWORKS.spec("lenet5:activation=relu, activation=tanh"), "each once")


def test_an_entry_without_options_says_so() -> None:
    with pytest.raises(UsageError, match="'std'") as caught:
        DEFENSES.spec("none:std=1")
    assert not str(caught.value).rstrip().endswith("expected one of"), "the list of options is empty"


def test_a_name_is_registered_once() -> None:
    registry = Registry("toy", "toys", "TOYS")
    registry.register("a")(len)
    with pytest.raises(ValueError, match="toy 'a' is registered twice"):
        registry.register("a")(len)
    assert registry.factories == {"a": len}


def test_a_name_that_two_sources_register_is_refused(tmp_path: Path) -> None:
    twice = '@TOYS.register("a")\ndef first(): ...\n\n@TOYS.register("a")\ndef second(): ...\n'
    with pytest.raises(ValueError, match="'a' is registered twice"):
        _ = toy_registry(tmp_path, twice).entries


def test_an_option_without_a_readable_type_is_refused(tmp_path: Path) -> None:
    registry = toy_registry(tmp_path, '@TOYS.register("a")\ndef a(*, x: list[int]): ...\n')
    with pytest.raises(TypeError, match="'x'"):
        _ = registry.entries


def test_every_attack_says_how_it_gets_labels_and_what_it_assumes() -> None:
    """The record of every trial tells both."""
    for entry in ATTACKS.entries.values():
        wanted = () if "trains" in entry.facts else ("labels", "priors")
        assert all(isinstance(entry.facts[name], str) and entry.facts[name] for name in wanted)


def test_every_network_has_the_facts_that_plans_fill_in() -> None:
    wanted = {"resolution": int, "preparation": str, "batch": int, "classes": int, "closure_seconds": float}
    for entry in NETWORKS.entries.values():
        assert {name: type(entry.facts[name]) for name in wanted} == wanted
        assert entry.facts["channels"] in (None, 1, 3)
