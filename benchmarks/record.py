"""Results as JSON under results/, with the machine, the versions and the date."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import resource
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


def peak_rss_mib() -> float:
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fresh_processes() -> ProcessPoolExecutor:
    """Runs each job in a process of its own with one thread, two at a time where there are cores.

    The peak of one job would hide in what another left behind; more at a time would share the
    memory's bandwidth. Fewer cores can be given with `taskset`.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    workers = min(2, len(os.sched_getaffinity(0)))
    return ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1)


class PeakMemory:
    """How far this process's resident memory rises from here to `read`; one at a time.

    Linux counts a process's peak since the last reset (`proc(5)`, clear_refs).
    """

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self._before = _status_mib("VmRSS")

    def read(self) -> float:
        """MiB at the peak over what there was at the start."""
        return _status_mib("VmHWM") - self._before


def _status_mib(field: str) -> float:
    [line] = [
        x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if field in x
    ]
    return int(line.split()[1]) / 1024


def record(name: str, figures: dict[str, Any]) -> Path:
    """Write a benchmark's figures with what they were measured on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    document = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return file


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
