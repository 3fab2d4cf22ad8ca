"""Where a number comes from and what it cost: versions, device, settings, seconds, memory."""

from __future__ import annotations

import ctypes
import math
import platform
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), "/proc/self/status"
PACKAGES = ("dlgbench", "torch", "torchvision", "pytorch-lightning", "torchmetrics", "numpy", "scikit-image")


def exact_float32() -> None:
    """Full float32 products and repeatable kernels; cuDNN would otherwise use TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def facts(device: torch.device) -> dict[str, Any]:
    """The provenance of a record, in JSON values."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "threat_model": "honest-but-curious server, one update of a client or of those it is summed with",
        "selection": "start and best iterate by the objective",
        "assignment": "one to one, least total MSE",
    }


def device_name(device: torch.device, threads: int | None = None) -> str:
    """The processor or GPU in words; ``threads`` are those used of a processor, torch's unless given."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = threads or torch.get_num_threads()
    return f"{_processor()}, {threads} threads" if device.type == "cpu" else device.type


def free_memory(device: torch.device) -> float:
    """Bytes that a run may still take, infinite where the platform does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return float(_number("/proc/meminfo", "MemAvailable"))
    except (OSError, LookupError):
        return math.inf


class Meter:
    """Measures seconds and memory on ``device`` from its construction to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError, AttributeError):  # only with glibc: give back what is free
                ctypes.CDLL(None).malloc_trim(0)
            with suppress(OSError):  # absent but on Linux, and forbidden in some containers
                CLEAR_REFS.write_text("5")  # the peak from now on: proc(5), /proc/pid/clear_refs
                self.before = _number(STATUS, "VmRSS")
        self.started, self.worked = time.perf_counter(), time.process_time()

    def stop(self, trials: int = 1) -> dict[str, Any]:
        """Seconds and CPU-seconds a trial, and the peak in bytes of the device's memory, or on Linux of what
        was added.

        Trials that shared a batch share its time equally.  The memory is None where the platform does
        not tell; what this process held before is not counted.
        """
        seconds = round((time.perf_counter() - self.started) / trials, 3)
        worked = round((time.process_time() - self.worked) / trials, 3)
        if self.device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _number(STATUS, "VmHWM") - self.before if self.before else None
        return {
            "seconds": seconds, "cpu_seconds": worked, "trials_in_batch": trials, "peak_memory_bytes": peak
        }  # fmt: skip


def _number(file: str, line: str) -> int:
    """The bytes that a file of /proc states in kB."""
    return int(Path(file).read_text().split(f"{line}:")[1].split()[0]) * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
