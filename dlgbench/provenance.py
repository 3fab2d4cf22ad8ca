"""Where a number comes from and what it cost: versions, device, settings, seconds, memory."""

from __future__ import annotations

import hashlib
import platform
import resource
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

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
        "deterministic": torch.backends.cudnn.deterministic,
        "threat_model": "honest-but-curious server, one gradient after one local step, untrained weights",
        "selection": "best iterate by gradient distance, one start",
        "assignment": "one to one, least total MSE",
    }


def digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's values in float32, which says whether two runs had the same data."""
    return hashlib.sha256(tensor.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def device_name(device: torch.device) -> str:
    """The processor or GPU in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


class Meter:
    """Measures from its construction to `stop`."""

    def __init__(self) -> None:
        _reset_peak()
        self.started = time.perf_counter()

    def stop(self, device: torch.device) -> dict[str, Any]:
        """Seconds, and the peak memory in bytes: of the device, or of this process on a CPU."""
        seconds = time.perf_counter() - self.started
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()
        return {"seconds": round(seconds, 3), "peak_memory_bytes": peak}


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:  # Linux only: see proc(5), /proc/pid/clear_refs
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_resident() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
