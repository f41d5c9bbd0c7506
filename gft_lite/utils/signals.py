"""SIGINT and SIGTERM are handled at the end of a step, so that a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console


class Interrupt:
    """The signals received so far."""

    def __init__(self) -> None:
        self.received: set[int] = set()


@contextmanager
def defer_signals(console: Console) -> Iterator[Interrupt]:
    """Record the first SIGINT or SIGTERM; a second one of the same kind interrupts at once.

    A launcher sends SIGTERM after a Ctrl-C, so the other kind does not interrupt. Outside the main
    thread, where Python allows no handlers, nothing changes.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def record(number: int, frame: FrameType | None) -> None:
        if number in interrupt.received:
            raise KeyboardInterrupt
        interrupt.received.add(number)
        console.print("stopping after this step; once more stops at once")

    before = {s: signal.signal(s, record) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
