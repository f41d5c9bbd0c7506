"""The folder of the installed package, and that of its cache."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def cache_folder() -> Path:
    """The folder for files that gft-lite can recreate."""
    if own := os.environ.get("GFT_LITE_CACHE"):
        return _expand_home(own)
    return _expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gft-lite"


def _expand_home(path: str) -> Path:
    """A path with `~` replaced; pathlib raises an error for an unknown user, os.path does not."""
    return Path(os.path.expanduser(path))
