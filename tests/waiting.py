"""Waiting for what another thread or process does, where a pause might be too short."""

from __future__ import annotations

import time
from collections.abc import Callable

from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import UserError


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Return once the condition holds; fails after a time that only an error needs."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def wait_for_end(run: RunFolder) -> None:
    """Return once no process trains in a run's folder: a trial ends when it loses its sweep."""
    wait_until(lambda: not _is_locked(run))


def _is_locked(run: RunFolder) -> bool:
    try:
        with run.lock():
            return False
    except UserError:
        return True
