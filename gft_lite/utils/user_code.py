"""Errors of the user's own code: modules and functions that a recipe names by a dotted path."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

MAX_CHARS = 300


@contextmanager
def user_errors_as(make_error: Callable[[str], Exception]) -> Iterator[None]:
    """Convert whatever the user's code raises into `make_error("TypeName: message")`.

    This includes SystemExit, which would end the program with the user's exit code, and a
    KeyboardInterrupt raised by the code itself. An interrupt by a signal passes unchanged.
    """
    with _record_signals() as received:
        try:
            yield
        except BaseException as error:
            if received:
                raise
            raise make_error(error_text(error)) from error


def error_text(error: BaseException) -> str:
    """The type and message of an exception, on one line."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # the user's own __str__
        text = ""
    name = type(error).__name__
    return f"{name}: {text[:MAX_CHARS]}" if text else name


@contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Record the SIGINT and SIGTERM that arrive, on their way to the installed handlers."""
    received: list[int] = []
    installed = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.getsignal(number)
            if callable(previous):
                handler = _recorder(received, previous)
                signal.signal(number, handler)
                installed[number] = handler, previous
    try:
        yield received
    finally:
        for number, (handler, previous) in installed.items():
            if signal.getsignal(number) is handler:  # else the user's code installed its own
                signal.signal(number, previous)


Handler = Callable[[int, FrameType | None], object]


def _recorder(received: list[int], previous: Handler) -> Handler:
    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)
        previous(number, frame)

    return record
