"""The built-in laboratory: a small reasoning task and a tiny pretrained base, no download."""

from __future__ import annotations

from pathlib import Path

from gft_lite.lab.task import rows

BASE = Path(__file__).parent / "base"

__all__ = ["BASE", "rows"]
