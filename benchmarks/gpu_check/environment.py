"""What the machine is, and two ceilings: a copy in the device's memory, a product of matrices."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import bitsandbytes
import torch
from torch import Tensor

from benchmarks.gpu_check.parts import Figures, Notes
from benchmarks.gpu_check.scale import Setup
from benchmarks.gpu_check.work import timed


def check(setup: Setup, notes: Notes) -> None:
    """Note the machine, and what its memory and its arithmetic can do."""
    notes.case("machine", machine, setup)
    notes.case("copy", copy, setup)
    notes.case("matmul", matmul, setup)


def machine(setup: Setup) -> Figures:
    """The GPU, and what bitsandbytes found to run on it."""
    found: Figures = {
        "torch_threads": torch.get_num_threads(),
        "bitsandbytes": type(bitsandbytes.cextension.lib).__name__,
    }
    if setup.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "gib": total / 2**30,
            "context_gib": (total - free - torch.cuda.memory_reserved()) / 2**30,
        }
    return found


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, encoding="utf-8"
    ).stdout.strip()


def copy(setup: Setup) -> Figures:
    """GB/s of a copy, counting what is read and what is written."""
    size = 2**20 if setup.tiny else 2**32
    source = torch.ones(size, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    seconds = _best(setup, lambda: target.copy_(source))
    return {"gb_per_s": 2 * size / seconds / 1e9}


def matmul(setup: Setup) -> Figures:
    """TFLOP/s of a bf16 product of random square matrices."""
    n = 256 if setup.tiny else 8192
    a, b = (torch.randn(n, n, device=setup.device).bfloat16() for _ in range(2))
    seconds = _best(setup, lambda: a @ b)
    return {"tflop_per_s": 2 * n**3 / seconds / 1e12}


def _best(setup: Setup, function: Callable[[], Tensor]) -> float:
    """Seconds of one call, the mean of ten, the best of three rounds after one that warms up."""

    def ten() -> None:
        for _ in range(10):
            function()

    return min(timed(setup, ten)[1] for _ in range(4)) / 10
