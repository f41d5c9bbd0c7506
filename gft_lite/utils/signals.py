"""Ctrl-C and SIGTERM wait for the end of a step, so that a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console


class Interrupt:
    """Which signals asked to stop."""

    def __init__(self) -> None:
        self.received: set[int] = set()


@contextmanager
def defer_signals(console: Console) -> Iterator[Interrupt]:
    """Note the first SIGINT or SIGTERM instead of dying of it; a second one interrupts at once.

    The second must be of the same kind: a launcher sends the other one after a Ctrl-C.

    Off the main thread, where Python allows no handlers, signals do what they always do.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number in interrupt.received:
            raise KeyboardInterrupt
        interrupt.received.add(number)
        console.print("stopping after this step; once more stops at once")

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
