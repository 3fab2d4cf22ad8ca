"""What is wrong with this installation, and what mends it.

A broken torch may raise, crash or hang: only a child process imports it, which runs this file and prints its
findings as JSON.  It announces what is risky by a finding without detail, and the last of a check counts.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata, util
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, TimeoutExpired, run
from typing import Literal

from packaging.requirements import Requirement

IMPORTED = ("torch", "torchvision", "torchmetrics", "pytorch-lightning")
MALICIOUS = ("pytorch-lightning 2.6.2", "pytorch-lightning 2.6.3")  # never to be imported
PAIR = "pip install --upgrade --force-reinstall torch torchvision"  # either alone may not fit the other
CHECKOUT = "pip install . in the folder of setup.cfg, which declares what else is needed"
MENDS = {
    "python": "install Python 3.11 or newer", "dlgbench": CHECKOUT, "torch": PAIR, "torchvision": PAIR
}  # fmt: skip
DRIVER = "check CUDA_VISIBLE_DEVICES, the driver and the torch build: https://pytorch.org/get-started/locally"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GLOBAL_RANK", "NODE_RANK")
PATIENCE = 120.0  # seconds: a cold import from a network disk can take most of a minute
MARK = "dlgbench-doctor "  # tells the child's findings from what an import prints


@dataclass(frozen=True)
class Finding:
    """One thing looked at; ``remedy`` is empty where there is nothing to mend."""

    check: str
    level: Literal["ok", "warning", "error"]
    detail: str
    remedy: str = ""


def examine(out: Path) -> list[Finding]:
    """All that a run with records in ``out`` rests on; takes as long as importing torch, at most PATIENCE."""
    packages = [_package(needed) for needed in _needed()]
    fit = {found.check for found in packages if found.level == "ok"}
    sound = [name for name in IMPORTED if name in fit]
    return [*packages, *(_ask_child(sound) if "torch" in sound else []), _photos(), _output(out), _launcher()]


def broken(findings: Iterable[Finding]) -> bool:
    """Whether any of ``findings`` keeps reconstructions from running."""
    return any(found.level == "error" for found in findings)


def _version(name: str) -> str:
    try:  # a package removed by halves has the version None
        return "{}.{}.{}".format(*sys.version_info) if name == "python" else metadata.version(name) or ""
    except metadata.PackageNotFoundError:
        return ""


def _needed() -> list[Requirement]:
    """Python, dlgbench itself and all that its installation declares, less what only extras ask for."""
    declared = metadata.requires("dlgbench") or () if _version("dlgbench") else ()
    needed = [Requirement(text) for text in ("python>=3.11", "dlgbench", *declared)]
    return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]


def _package(needed: Requirement) -> Finding:
    name, version = needed.name, _version(needed.name)
    remedy = MENDS.get(name, f'pip install --upgrade "{needed}"')
    if f"{name} {version}" in MALICIOUS:
        return Finding(name, "error", f"{version} is malicious", f"{remedy}, then change all your passwords")
    if version and needed.specifier.contains(version, prereleases=True):
        return Finding(name, "ok", version)
    return Finding(name, "error", f"{version}, expected {needed}" if version else "not installed", remedy)


def _ask_child(packages: Sequence[str]) -> list[Finding]:
    command = [sys.executable, "-P", __file__, *packages]  # -P: this folder's modules have everyday names
    try:
        child = run(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, timeout=PATIENCE)
        output, why = child.stdout, f"exit status {child.returncode}"
    except TimeoutExpired as late:
        output, why = late.stdout or b"", f"no answer within {PATIENCE:g} s"
    lines = output.decode(errors="replace").strip().splitlines()
    told = [Finding(**json.loads(line.removeprefix(MARK))) for line in lines if line.startswith(MARK)]
    why = ": ".join([why, *(line for line in lines[-1:] if not line.startswith(MARK))])
    last = {found.check: found for found in (Finding("import torch", "error", ""), *told)}.values()
    return [found if found.detail else _failure(found, why) for found in last]


def _failure(probe: Finding, why: str) -> Finding:
    package = probe.check.removeprefix("import ")
    if package not in IMPORTED:
        return replace(probe, detail=why, remedy=f"{DRIVER}, or run with --accelerator cpu")
    for needed in map(Requirement, metadata.requires(package) or ()):
        fits = needed.specifier.contains(_version("torch"), prereleases=True)
        if needed.name == "torch" and not needed.marker and not fits:
            why += f" ({package} {_version(package)} needs {needed}, not torch {_version('torch')})"
    return replace(probe, detail=why, remedy=MENDS.get(package, f"{PAIR} {package}"))


def _photos() -> Finding:
    origin = getattr(util.find_spec("skimage"), "origin", None) or "skimage"
    if not Path(origin).parent.joinpath("data", "astronaut.png").is_file():
        remedy = "pip install --upgrade --force-reinstall --no-deps scikit-image"
        return Finding("photos", "error", "scikit-image does not hold data/astronaut.png", remedy)
    more = _version("foolbox") or '3.3.4 not installed, get it with pip install "dlgbench[samples]"'
    return Finding("photos", "ok", f"those of scikit-image; foolbox (optional): {more}")


def _output(out: Path) -> Finding:
    try:
        place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return Finding("output", "error", f"cannot write in {out}: {error.strerror}", "choose another --out")
    return Finding("output", "ok", f"{out} is writable")


def _launcher() -> Finding:
    names = {"SLURM_*" if name.startswith("SLURM_") else name for name in os.environ}
    if stray := " ".join(sorted(names & {*LAUNCHER, "SLURM_*"})):
        return Finding("launcher", "warning", f"{stray} would silence loggers; dlgbench clears them itself")
    return Finding("launcher", "ok", "no stray variables of a distributed launcher")


def _imports(packages: Sequence[str]) -> Iterator[Finding]:
    for package in packages:
        yield Finding(f"import {package}", "error", "")
        module = import_module(package.replace("-", "_"))
        yield Finding(f"import {package}", "ok", f"{module.__version__} from {module.__file__}")
    yield from _devices()


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("cpu", "ok", f"{torch.get_num_threads()} threads")
    yield Finding("cuda", "error", "")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        yield Finding("cuda", "warning", "")
        torch.cuda.current_device()  # raises, and tells why the driver is of no use
    build = f"CUDA {version}" if (version := torch.version.cuda or torch.version.hip) else "CPU only"
    yield Finding("cuda", "ok", f"{build} build, {torch.cuda.device_count()} devices")
    matrix = torch.arange(64.0).reshape(8, 8)  # whole numbers: the products are exact, even in TF32
    for device in map("cuda:{}".format, range(torch.cuda.device_count())):
        yield Finding(device, "error", "")
        torch.testing.assert_close((matrix.to(device) @ matrix.to(device)).cpu(), matrix @ matrix)
        facts = torch.cuda.get_device_properties(device)
        yield Finding(device, "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")


if __name__ == "__main__":
    # One line: CUDA's messages name the cause in their first line, those of wrapped errors in their last.
    sys.excepthook = lambda kind, error, _: print(f"\n{kind.__name__}:", *str(error).split(), file=sys.stderr)
    for finding in _imports(sys.argv[1:]):
        print(f"\n{MARK}{json.dumps(asdict(finding))}", flush=True)
