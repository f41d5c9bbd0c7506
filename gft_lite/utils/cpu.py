"""What the CPU of this machine computes fast."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def has_bf16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True if the CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    if not cpuinfo.exists():
        return False
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
