"""The CPU of this machine: its instructions, and how many threads a process takes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

MAX_THREADS = 16  # More rarely help the matrices of small models.


@cache
def has_bf16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True if the CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    if not cpuinfo.exists():
        return False
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def set_threads(threads: int | None) -> int:
    """Set torch's CPU threads to `threads`, by default to `default_threads()`; returns them."""
    import torch

    torch.set_num_threads(threads or default_threads())
    return torch.get_num_threads()


def default_threads() -> int:
    """The CPU threads of a process whose recipe names none: OMP_NUM_THREADS, or a core each.

    The cores are shared by the processes of a launch on this machine.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_THREADS, usable_cores() // processes))


def usable_cores(cpus: Iterable[int] | None = None, system: Path = Path("/sys")) -> int:
    """The physical cores that this process may use, by its affinity and its cgroup's quota.

    `cpus` are the logical ones, by default those of the affinity; threads of one core count once.
    """
    if cpus is None:
        count = os.cpu_count() or 1
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(count)
    files = [system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in cpus]
    cores = len(
        {file.read_text(encoding="utf-8") if file.exists() else str(file) for file in files}
    )
    quota = _quota(system / "fs/cgroup")
    return max(1, min(cores, int(quota)) if quota else cores)


def _quota(cgroup: Path) -> float | None:
    """The CPUs that a container may use on average, None without a limit."""
    try:
        if (cgroup / "cpu.max").exists():
            limit, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
        else:
            limit, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")
                for name in ("quota", "period")
            )
        return float(limit) / float(period) if float(limit) > 0 else None
    except (OSError, ValueError):  # "max", or no cgroup.
        return None


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep where they wait for each other; call it before importing torch.

    By default a waiting thread keeps its core busy, which on a core that others share makes the
    thread that it waits for late. The user's own value takes precedence.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
