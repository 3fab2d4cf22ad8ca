"""When to compile a closure, and where the compiled code is kept for later runs."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

import dlgbench
from dlgbench.closures import Closure, Miscompiled
from dlgbench.leak import Leak
from dlgbench.provenance import device_name

Mode = Literal["auto", "on", "off"]
MODULES = (
    "batchnorm", "bilinear", "closures", "convolution", "dense", "leak", "networks", "prefixes", "prepare",
    "softening", "spectrum", "stochastic", "window", "winograd",
)  # fmt: skip
"""What a closure may run code of, beside attacks and defences."""
SAVED = 0.5
"""The share of a closure's eager time that compiling is taken to save.  On two CPU cores it was a fifth
(resnet18) to half (densenet121) on an EPYC, half to six tenths on a Xeon; nine tenths (lenet_dlg) on both."""


def expected_seconds(leak: Leak) -> float:
    """What compiling takes: on two CPU cores, 20 to 80 s for LeNet, 430 to 620 for DenseNet-121."""
    return 20 + 1.6 * len(leak.weights)


def folder() -> Path:
    """``$XDG_CACHE_HOME/dlgbench`` or ``~/.cache/dlgbench``, which nobody else may write to."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(home) / "dlgbench"
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


@dataclass
class Compiler:
    """Compiles closures where the mode says so: ``auto`` where the calls to come will repay it.

    Where that fails, it says so once through ``tell`` and leaves every closure eager; where only the
    values are wrong, it says so and leaves this one eager.
    """

    mode: Mode = "off"
    tell: Callable[[str], None] = warnings.warn
    broken: bool = field(default=False, init=False)
    wrong: set[Path] = field(default_factory=set, init=False)

    def prepare(
        self, closure: Closure, identity: str, example: tuple[Any, Any, Leak], calls: int
    ) -> dict[str, Any]:
        """Make ``closure`` ready for ``calls`` calls with arguments like ``example``.

        ``identity`` is what the code depends on beside this package, torch, the device and the width.
        Returns the figures on which it was decided, and the seconds it took, where it was decided now.
        """
        if self.mode == "off" or self.broken:
            return {}
        try:
            path = folder() / f"{_key(identity, closure, example[0].device)}.pt2"
            if path in self.wrong:
                return {}
            with FileLock(path.with_suffix(".lock")), _quiet():  # waits where another is making it
                return self._prepare(closure, path, example, calls)
        except (OSError, NotImplementedError) as error:  # a home that is not ours, or that knows no locks
            self.give_up(_complaint(error))
            return {}

    def elsewhere(self) -> Compiler:
        """One for another process, which compiles nothing where this one has given up."""
        return Compiler("off" if self.broken else self.mode)

    def give_up(self, message: str) -> None:
        """Compile no more, and say so once."""
        if not self.broken:
            self.tell(message)
        self.broken = True

    def _prepare(
        self, closure: Closure, path: Path, example: tuple[Any, Any, Leak], calls: int
    ) -> dict[str, Any]:
        with suppress(OSError, RuntimeError, ValueError):  # not there, damaged or wrong: it is made anew
            seconds = float(_note(path).read_text())
            closure.load(path, *example)
            return {"compiled_earlier_in_seconds": seconds}
        figures: dict[str, Any] = {
            "calls_expected": calls,
            "eager_call_seconds": _seconds(closure, example),
            "compile_expected_seconds": expected_seconds(example[2]),
        }
        saved = calls * figures["eager_call_seconds"] * SAVED
        if self.mode == "on" or saved > figures["compile_expected_seconds"]:
            figures["compile_seconds"] = self._compile(closure, path, example)
        return figures

    def _compile(self, closure: Closure, path: Path, example: tuple[Any, Any, Leak]) -> float:
        started = time.perf_counter()
        unfinished = path.with_suffix(f".{os.getpid()}.pt2")
        try:
            closure.compile(unfinished, *example)
            closure.load(unfinished, *example)
            _note(path).write_text(f"{time.perf_counter() - started:.1f}")
            unfinished.replace(path)
        except Miscompiled as error:
            self.wrong.add(path)
            self.tell(_complaint(error))
        except Exception as error:  # of torch's, of the compiler's, of the system's: all end the same way
            self.give_up(_complaint(error))
        finally:
            unfinished.unlink(missing_ok=True)
        return round(time.perf_counter() - started, 1)


def _complaint(error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), "")[:200]
    return f"could not compile, going on without ({type(error).__name__}: {reason})"


def _seconds(closure: Closure, example: tuple[Any, Any, Leak]) -> float:
    """What ``width`` cases cost in the second full call: the first is slower, up to ninefold for LeNet."""
    rows = torch.arange(closure.together, device=example[0].device) % closure.width
    full = example[0][rows], example[1][rows], example[2].rows(rows)
    for _ in range(2):
        started = time.perf_counter()
        float(closure(*full).objective[0])  # waits for the device
    return round((time.perf_counter() - started) * closure.width / closure.together, 4)


def _key(identity: str, closure: Closure, device: torch.device) -> str:
    machine = (device.type, device_name(device, closure.threads), torch.__version__)
    parts = (identity, closure.width, *machine, _sources())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _note(path: Path) -> Path:
    """Where it is kept how many seconds the compiled code took."""
    return path.with_suffix(".seconds")


@cache
def _sources() -> str:
    """A digest of all code that a closure may run."""
    root = Path(dlgbench.__file__).parent
    files = [root / f"{name}.py" for name in MODULES]
    files += [file for folder in ("attacks", "defenses") for file in sorted((root / folder).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's compiler to itself, and its files out of the shared ``/tmp``."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder() / "inductor"))
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
