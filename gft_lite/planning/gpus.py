"""Memory sizes as a user writes them: a number with a unit, or the name of a GPU."""

from __future__ import annotations

import re

from gft_lite.utils.errors import UserError, nearest
from gft_lite.utils.memory import GIB

# GiB of memory that the driver leaves of the nominal size, rounded down (estimates).
GPUS = {
    "rtx3060": 12, "rtx3090": 24, "rtx4060": 8, "rtx4070": 12, "rtx4080": 16, "rtx4090": 24,
    "rtx5080": 16, "rtx5090": 32, "t4": 15, "l4": 22, "a10": 22, "l40s": 44, "a6000": 48,
    "a100-40": 39, "a100": 79, "h100": 79, "h200": 139,
}  # fmt: skip
MAX_SIZE = 1024**2 * GIB  # Larger sizes are typing errors.


def parse_size(text: str, field: str = "--gpu") -> int:
    """Bytes of a size such as 8GiB or 24GB, or of a GPU's memory by its name.

    Raises: UserError that names `field`.
    """
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])(i?)B", text, re.IGNORECASE):
        unit = (1024 if found[3] else 1000) ** (3 if found[2] in "gG" else 2)
        amount = float(found[1])
        if not 1 <= amount * unit <= MAX_SIZE:
            rule = f"must be larger than 0 and at most {MAX_SIZE // GIB} GiB"
            raise UserError([f"{field}: {rule}, got {text!r}. Give the size of a GPU's memory."])
        return int(amount * unit)
    name = text.lower().replace(" ", "")
    if name in GPUS:
        return GPUS[name] * GIB
    close = nearest(name, GPUS)
    hint = f"Did you mean {close}?" if close else f"Known names: {', '.join(GPUS)}."
    rule = "must be a size such as 24GiB or a GPU's name"
    raise UserError([f"{field}: {rule}, got {text!r}. {hint}"])
