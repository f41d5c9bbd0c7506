"""The built-in lab: a small reasoning task and a tiny pretrained base model, without downloads.

`task` makes the rows, `pretrain` the base model in `base/`. May import `types` and `utils`.
"""

from __future__ import annotations

from pathlib import Path

from gft_lite.lab.task import rows

BASE = Path(__file__).parent / "base"

__all__ = ["BASE", "rows"]
