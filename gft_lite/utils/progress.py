"""Progress on a terminal, or as lines where the output is not a terminal."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")

_LOG_SECONDS = 15.0  # Between two lines of a phase where the output is not a terminal.
_SLOW_SECONDS = 60.0  # Between two lines for units that take longer, such as steps.
_FIRST_SHARE = 0.1  # Of a phase, before the time that is left is estimated.
_LONG_SECONDS = 2.0  # A phase that took longer prints its duration.
_SPEED_SECONDS = 3600.0  # The speed of units is estimated from those of so long.
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_LINES = 20  # Lines for a whole run where the output is not a terminal.
_UNKNOWN_TOTAL = 200  # Units after which _LINES lines are printed if the total is not known.


class ProgressDisplay:
    """A live panel above a bar on a terminal; elsewhere 20 lines for `total` units, more if slow.

    `unit` names what is counted, such as "step". Use it as a context manager.
    """

    def __init__(self, console: Console, unit: str, total: int | None, completed: int = 0) -> None:
        self.console = console
        self._unit, self._total = unit, total
        self._progress = Progress(
            TextColumn(unit), BarColumn(bar_width=None), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), _TimeLeftColumn(),
            console=console, expand=True, speed_estimate_period=_SPEED_SECONDS,
        )  # fmt: skip
        self._task = self._progress.add_task(unit, total=total, completed=completed)
        self._live = Live(self._progress, console=console, transient=True)
        self._lines = self._share(completed)
        self._started = self._printed = time.perf_counter()
        self._first = completed

    @property
    def is_live(self) -> bool:
        """True if `update` shows its panel."""
        return self.console.is_terminal

    def __enter__(self) -> ProgressDisplay:
        if self.is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since the display was made."""
        return time.perf_counter() - self._started

    def update(
        self, completed: int, text: str = "", panel: RenderableType | None = None,
        left: float | None = None,
    ) -> None:  # fmt: skip
        """Show the state after `completed` units: `panel`, by default `text`, or a line of text.

        `left` are the seconds that are left, by default those of as many units at the mean speed.
        """
        if self.is_live:
            self._progress.update(self._task, completed=completed, left=left)
            self._live.update(Group(Text(text) if panel is None else panel, self._progress))
        elif text and self._is_due(completed):
            of_total = f"/{self._total:,}" if self._total else ""
            self.print(
                f"{self._unit} {completed:,}{of_total}  {text}{self.time_left(completed, left)}"
            )
            self._lines = self._share(completed)
            self._printed = time.perf_counter()

    def print(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _is_due(self, completed: int) -> bool:
        """True if a log gets a line after `completed` units."""
        late = time.perf_counter() - self._printed > _SLOW_SECONDS
        return late or self._share(completed) > self._lines or completed == self._total

    def time_left(self, completed: int, left: float | None = None) -> str:
        """The time that is left, once there is a reliable estimate; `left` as in `update`."""
        units = completed - self._first
        if left is None and units > 0:
            left = self.elapsed / units * ((self._total or 0) - completed)
        if not left or left < 0 or self.elapsed < _SLOW_SECONDS:
            return ""
        return f"  about {format_duration(left)} left"

    def _share(self, completed: int) -> int:
        return _LINES * completed // (self._total or _UNKNOWN_TOTAL)


class _TimeLeftColumn(TimeRemainingColumn):
    """The seconds `left` that `ProgressDisplay.update` was given, or else rich's own estimate."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        if left is None:
            return super().render(task)
        return Text(str(timedelta(seconds=round(left))), style="progress.remaining")


@dataclass(eq=False)
class Phase:
    """A phase of work: its text, and how far it is."""

    text: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def describe(self) -> str:
        """The phase on one line: n of N, the time that has passed and is left, tokens/s.

        A narrow terminal cuts the end.
        """
        seconds = time.perf_counter() - self.started
        parts = []
        if self.total and self.total > 1:
            parts.append(f"{self.done:,} of {self.total:,} {self.unit}")
        parts.append(format_duration(seconds))
        # Units that run side by side end late: the first ones say little of the rest.
        if self.total and _FIRST_SHARE <= self.done / self.total < 1:
            left = seconds / self.done * (self.total - self.done)
            parts.append(f"about {format_duration(left)} left")
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens, {self.tokens / seconds:,.0f} tokens/s")
        return f"{self.text}: {', '.join(parts)}"

    def __rich__(self) -> Text:
        return Text(self.describe(), no_wrap=True, overflow="ellipsis")


def format_duration(seconds: float) -> str:
    """Seconds as `45 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def sparkline(values: Sequence[float | None], width: int, *, ascii_only: bool = False) -> str:
    """Values as at most `width` bars, each the mean of its share; a blank where none is finite."""
    count = min(width, len(values))
    bounds = [len(values) * i // count for i in range(count + 1)] if count else []
    shares = [
        [v for v in values[low:high] if v is not None and math.isfinite(v)]
        for low, high in pairwise(bounds)
    ]
    means = [sum(share) / len(share) if share else None for share in shares]
    known = [mean for mean in means if mean is not None]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    bars = _ASCII_BARS if ascii_only else _BARS
    return "".join(
        " " if mean is None else bars[round((mean - low) / span * 7) if span else 3]
        for mean in means
    )


_phases: list[Phase] = []  # Those that are shown, the innermost one last.


_hidden = False  # True while no progress is shown.


def stderr_console() -> Console:
    """The console for progress: lines are wrapped on a terminal, but not in a log."""
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty(), quiet=_hidden)


@contextmanager
def hide_progress() -> Iterator[None]:
    """Show no progress, for the length of a `with`; the processes started in it show theirs."""
    global _hidden
    _hidden = True
    try:
        yield
    finally:
        _hidden = False


@contextmanager
def show_phase(
    console: Console, text: str, *, announce: bool = True, log_seconds: float = _LOG_SECONDS
) -> Iterator[Phase]:
    """Show a phase while it runs: live on a terminal, else as lines every `log_seconds`.

    With `announce`, a line at the start in a log, and at the end a line with a long duration. Of
    phases inside each other, a log gets the lines of the innermost one, after the outer texts.
    """
    phase, ended = Phase(text), threading.Event()
    live = console.is_terminal
    if announce and not live:
        _print_line(console, text)

    def print_lines() -> None:
        while not ended.wait(log_seconds):
            if _phases and _phases[-1] is phase:
                outer = "".join(f"{p.text}: " for p in _phases[:-1] if p.text)
                _print_line(console, outer + phase.describe())

    thread = threading.Thread(target=print_lines, daemon=True)
    if not live and not console.quiet:
        thread.start()
    _phases.append(phase)
    try:
        with console.status(phase) if live else nullcontext():
            yield phase
    finally:
        _phases.remove(phase)
        ended.set()
        if thread.ident is not None:
            thread.join()
    seconds = time.perf_counter() - phase.started
    if announce and seconds > _LONG_SECONDS:
        _print_line(console, f"{text}: done in {format_duration(seconds)}")


def report_progress(done: int, total: int, unit: str, tokens: int = 0) -> None:
    """Show in the innermost phase, if there is one, that `done` of `total` units are done.

    `tokens` are those sampled since the last call.
    """
    if _phases:
        phase = _phases[-1]
        phase.done, phase.unit = done, unit
        phase.tokens += tokens
        phase.total = total if done < total else None  # The phase may go on with something else.


def track(items: Sequence[T], unit: str) -> Iterator[T]:
    """Iterate over `items` and report how many of them are done."""
    for number, item in enumerate(items):
        report_progress(number, len(items), unit)
        yield item
    report_progress(len(items), len(items), unit)


@contextmanager
def show_sampling(
    console: Console, total: int, log_seconds: float = _LOG_SECONDS
) -> Iterator[Callable[[int], None]]:
    """Show how far a call is that samples `total` responses, for the length of a `with`.

    The function it yields is called with the number of tokens of each response.
    """
    with show_phase(console, "sampling", announce=False, log_seconds=log_seconds) as phase:
        phase.total, phase.unit = total, "responses"

        def update(tokens: int) -> None:
            phase.done += 1
            phase.tokens += tokens

        yield update


def _print_line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
