"""Memory sizes as a user writes them: a number with a unit, or the name of a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from gft_lite.utils.errors import UserError, nearest
from gft_lite.utils.memory import GIB, free_ram

# GiB of memory that the driver leaves of the nominal size, rounded down (estimates).
GPUS = {
    "rtx2060": 6, "rtx2070": 8, "rtx2080": 8, "rtx2080ti": 11,
    "rtx3050": 8, "rtx3060": 12, "rtx3060ti": 8, "rtx3070": 8, "rtx3070ti": 8, "rtx3080": 10,
    "rtx3080ti": 12, "rtx3090": 24, "rtx3090ti": 24,
    "rtx4050": 6, "rtx4060": 8, "rtx4060ti": 8, "rtx4070": 12, "rtx4070super": 12, "rtx4070ti": 12,
    "rtx4070tisuper": 16, "rtx4080": 16, "rtx4080super": 16, "rtx4090": 24,
    "rtx5050": 8, "rtx5060": 8, "rtx5060ti": 16, "rtx5070": 12, "rtx5070ti": 16, "rtx5080": 16,
    "rtx5090": 32,
    "t4": 15, "l4": 22, "a10": 22, "a10g": 22, "a30": 23, "a40": 44, "l40": 44, "l40s": 44,
    "a6000": 48, "a100-40": 39, "a100": 79, "h100": 79, "gh200": 94, "h200": 139, "b200": 178,
}  # fmt: skip
MAX_SIZE = 1024**2 * GIB  # Larger sizes are typing errors.
# What makers and shops write around the name.
_AROUND = re.compile(r"nvidia|geforce|tesla|graphics|laptop|gpu|[\s_-]+|(?<=\d)gb?$")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan is for: a device with `size` bytes of memory, and its name for titles."""

    name: str
    device: Literal["cuda", "cpu"]
    size: int


def parse_size(text: str, field: str = "--gpu") -> int:
    """Bytes of a size such as 8GiB or 24GB, or of a GPU's memory by its name.

    A number up to 999 without a unit is a size in GiB; a longer one completes the name of a GPU.
    Raises: UserError that names `field`.
    """
    if found := re.fullmatch(r"(\d{1,3}(?:\.\d+)?)|(\d+(?:\.\d+)?) ?([GM])(i?)B?", text, re.I):
        number, with_unit, unit, binary = found.groups()
        size = GIB if number else (1024 if binary else 1000) ** (3 if unit in "gG" else 2)
        amount = float(number or with_unit)
        if not 1 <= amount * size <= MAX_SIZE:
            rule = f"must be larger than 0 and at most {MAX_SIZE // GIB} GiB"
            raise UserError([f"{field}: {rule}, got {text!r}. Give the size of a GPU's memory."])
        return int(amount * size)
    return GPUS[_complete_name(text, field)] * GIB


def gpu_name(text: str) -> str | None:
    """The name in GPUS that `text` means, None for a size and for a name that is unknown."""
    try:
        return None if text[:1].isdigit() and text[-1:] in "bB" else _complete_name(text, "")
    except UserError:
        return None


def _complete_name(text: str, field: str) -> str:
    names = {_AROUND.sub("", name): name for name in GPUS}
    written = _AROUND.sub("", text.lower())
    for key in (written, f"rtx{written}"):
        if key in names:
            return names[key]
    begun = [name for key, name in names.items() if written and key.startswith(written)]
    if len(begun) == 1:
        return begun[0]
    close = nearest(f"rtx{written}" if written.isdigit() else written, names)
    hint = f"Did you mean {names[close]}?" if close else f"Known names: {', '.join(GPUS)}."
    hint = f"Did you mean {', '.join(begun[:6])}?" if begun else hint
    rule = "must be a size such as 24GiB or a GPU's name"
    raise UserError([f"{field}: {rule}, got {text!r}. {hint}"])


def named_machine(gpu: str) -> Machine:
    """The GPU of a size or name that a user gives. Raises: UserError."""
    size = parse_size(gpu)
    return Machine(gpu_name(gpu) or "a card", "cuda", size)


def own_machine() -> Machine:
    """The first GPU of this machine, or its free RAM."""
    return _own_gpu() or own_ram()


def own_ram() -> Machine:
    """The free RAM of this machine."""
    return Machine("the CPU", "cpu", free_ram())


def _own_gpu() -> Machine | None:
    """The first GPU that nvidia-smi lists; torch, which knows too, takes seconds to import."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    first = done.stdout.partition("\n")[0]
    name, _, mib = first.rpartition(",")
    known = done.returncode == 0 and mib.strip().isdigit()
    return Machine(name.strip(), "cuda", int(mib) << 20) if known else None
