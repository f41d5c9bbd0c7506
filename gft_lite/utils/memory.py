"""Memory of this process and of its device, in bytes."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # The planner imports this module and works without torch.
    import torch

GIB = 1 << 30
LOGIT_CHUNK_BYTES = 64 << 20  # fp32 logits that the output head computes at a time.
# A larger vocabulary is cut into tiles of so many words and tokens for the fused head. On a CPU
# a tile stays in the cache, on a GPU kernels are few.
HEAD_TILE_WORDS = 4096
HEAD_TILE_TOKENS = {"cpu": 512, "cuda": 4096}
HEAD_BLOCK_TOKENS = 64  # that element-wise arithmetic on a CPU takes at a time.
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def head_tile_bytes(device: str, element: int, tokens: int, hidden: int) -> int:
    """Bytes of the fused head's tile, with the gradient's sums in fp32.

    On a GPU its exponentials stand beside its logits, in half precision a copy as well.
    """
    tokens = min(tokens, HEAD_TILE_TOKENS[device])
    block = HEAD_BLOCK_TOKENS if device == "cpu" else tokens
    logits = (4 + (2 if element == 2 else 0)) * tokens + 4 * block
    return logits * HEAD_TILE_WORDS + 3 * 4 * tokens * hidden


def free_ram() -> int:
    """Bytes of RAM that are available to this process."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
    free = int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * 4096
    # A container's limit can be lower than the machine's memory.
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if (
        limit.exists()
        and used.exists()
        and (text := limit.read_text(encoding="utf-8").strip()) != "max"
    ):
        free = min(free, int(text) - int(used.read_text(encoding="utf-8")))
    return free


def process_memory(kind: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in RAM, current (VmRSS) or peak (VmHWM); 0 without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(kind)]
    return found[0] if found else 0


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation where the C library returns it (glibc).

    Otherwise the system clears the pages of every activation again, a sixth of a training step's
    CPU time. Blocks above 32 MiB, the limit of glibc's heap, are still returned. Thresholds in
    glibc's variables MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    given = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}.intersection(os.environ)
    if mallopt is not None and not given:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def bound_product_caches() -> None:
    """Bound what oneDNN and torch's cache above it keep of half-precision products on a CPU.

    Both keep 1,024 by default, and every new number of tokens adds some sixty to each: in 80
    micro-batches, six layers of SmolLM2 took 1.1 GiB at first and 2.4 GiB in the end. Takes effect
    before a process's first such product, unless the environment has the variables.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def trim_heap() -> None:
    """Return freed memory to the system where the C library keeps it (glibc).

    Quantising a base leaves 0.4 GiB (135M parameters) to 1.7 GiB (0.6B) of it.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory(device: torch.device) -> int:
    """Peak bytes that torch allocated on a GPU since the last call; the process's peak on a CPU."""
    if device.type != "cuda":
        return process_memory("VmHWM")
    import torch

    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
