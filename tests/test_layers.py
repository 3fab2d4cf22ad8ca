"""The floors of the house: every import goes down."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import dlgbench

FLOORS: Sequence[set[str]] = (
    {"", "errors", "exits", "text"},
    {
        "registry",
        "images",
        "provenance",
        "linesearch",
        "history",
        "bilinear",
        "window",
        "stochastic",
        "spectrum",
        "denoising",
        "leastsquares",
        "shifts",
        "adam",
        "doctor",
        "prefixes",
    },
    {"batchnorm", "winograd"},
    {"convolution", "dense", "datasets", "metrics", "optim"},
    {"prepare"},
    {"defenses.base", "equations"},  # some change the network
    {"networks", "softening", "defenses.*"},  # networks are made of what `prepare` gives them
    {"leak", "case", "training", "defenses", "models"},
    {"defenses.lightning"},
    {"closures", "contrast", "labels", "masks", "newton", "residual", "inversion"},
    {"compiler", "continuation", "chains", "topdown"},
    {"peeling"},
    {"plan", "records", "attacks", "attacks.base"},
    {"attacks.frequencies"},  # others build upon it
    {"attacks.*", "victims", "leaderboard", "listing"},
    {"callbacks", "plots", "tradeoff", "utility", "lineup"},
    {"columns", "pareto", "scoring"},
    {"trial", "render", "report"},
    {"store", "display", "processes", "api"},
    {"grid", "executors"},
    {"runner", "views"},
    {"measure"},
    {"footprint", "reconstructions", "scaling"},
    {"session", "bench", "recommend"},
    {"cli"},
    {"__main__"},
)
"""From the ground up.  ``""`` is the package itself, ``attacks.*`` any other module of that folder."""
PACKAGES = {"attacks", "defenses"}
SEPARATE = [{"networks", "datasets", "defenses", "metrics", "optim"}, {"attacks.*"}, {"defenses.*"}]
"""Never each other, whatever their floors."""


def sources() -> dict[str, str]:
    """The source of every module of the package, by its name within the package."""
    root = Path(dlgbench.__file__).parent
    return {
        module_name(file.relative_to(root)): file.read_text(encoding="utf-8")
        for file in sorted(root.rglob("*.py"))
    }


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(module: str) -> str | None:
    """The name by which `FLOORS` knows a module."""
    for name in (module, f"{module.rpartition('.')[0]}.*"):
        if any(name in floor for floor in FLOORS):
            return name
    return None


def floor_of(module: str) -> int:
    return next(level for level, floor in enumerate(FLOORS) if place(module) in floor)


def imported(source: str, module: str, known: Mapping[str, object]) -> Iterator[str]:
    """Every module of the package that ``source`` imports, in functions and for types alone too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package_of(module, node.level), node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (resolved(name, known) for name in names if name.split(".")[0] == "dlgbench")


def package_of(module: str, level: int) -> str:
    """What ``level`` dots before a relative import stand for."""
    if level == 0:
        return ""
    parts = ["dlgbench", *module.split(".")]
    return ".".join(parts[: len(parts) - level + (module in PACKAGES)])


def resolved(name: str, known: Mapping[str, object]) -> str:
    """The longest part of a dotted name that is a module; the rest is what it holds."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in known and (len(parts) > 1 or place(parts[0]) is None):
        parts.pop()
    return ".".join(parts)


def violations(modules: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of ``modules``, a sentence each."""
    homeless = [f"{name} has no floor: give it one in FLOORS" for name in modules if place(name) is None]
    pairs = sorted(
        {
            (module, other)
            for module, source in modules.items()
            if place(module) is not None
            for other in imported(source, module, modules)
        }
    )
    return homeless + [
        f"{module} imports {other}: {wrong}" for module, other in pairs if (wrong := fault(module, other))
    ]


def fault(module: str, other: str) -> str:
    here, there = place(module), place(other)
    if there is None:
        return "which has no floor"
    if any(here in names and there in names for names in SEPARATE):
        return "these know nothing of each other"
    return "" if floor_of(other) < floor_of(module) or module == other else "imports go down"


def test_every_import_goes_down() -> None:
    found = sources()
    assert {"", "registry", "attacks.base", "attacks.dlg", "trial"} <= set(found)
    assert not violations(found), "\n".join(violations(found))


def test_a_module_has_one_floor() -> None:
    names = [name for floor in FLOORS for name in floor]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("leak", "from dlgbench.victims import leak_of", "leak imports victims: imports go down"),
        ("leak", "from dlgbench import victims", "leak imports victims: imports go down"),
        ("leak", "import dlgbench.victims as v", "leak imports victims: imports go down"),
        ("leak", "from .victims import leak_of", "leak imports victims: imports go down"),
        ("leak", "def late():\n    from dlgbench.case import Case", "leak imports case: imports go down"),
        (
            "case",
            "if TYPE_CHECKING:\n    from dlgbench.leak import Leak",
            "case imports leak: imports go down",
        ),
        ("networks", "from dlgbench import datasets", "networks imports datasets: these know nothing"),
        ("datasets", "from dlgbench.networks import build", "datasets imports networks: these know nothing"),
        ("attacks.idlg", "from dlgbench.attacks.dlg import DLG", "attacks.idlg imports attacks.dlg: these"),
        ("attacks.idlg", "from .dlg import DLG", "attacks.idlg imports attacks.dlg: these"),
        ("attacks.base", "from ..victims import leak_of", "attacks.base imports victims: imports go down"),
        (
            "attacks.base",
            "from dlgbench.attacks import dlg",
            "attacks.base imports attacks.dlg: imports go down",
        ),
        ("attacks", "from .dlg import DLG", "attacks imports attacks.dlg: imports go down"),
        ("novelty", "", "novelty has no floor"),
    ],
)
def test_what_goes_up_or_sideways_is_found(module: str, source: str, complaint: str) -> None:
    found = violations({"victims": "", "attacks.dlg": "", "leak": "", "case": "", module: source})
    assert len(found) == 1
    assert found[0].startswith(complaint)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("networks", "from dlgbench.prepare import Network"),
        ("networks", "import torch"),
        ("registry", "from dlgbench import errors"),
        ("victims", "from dlgbench import datasets, networks, __version__"),
        ("attacks.dlg", "from .base import Attack\nfrom ..leak import Leak"),
        ("cli", "from dlgbench.attacks.dlg import DLG\nimport dlgbench"),
    ],
)
def test_what_goes_down_is_let_be(module: str, source: str) -> None:
    assert not violations({module: source})
