"""Progress on a terminal, or as lines where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_LOG_SECONDS = 30.0  # Between two lines of one call where the output is not a terminal.
_REFRESH_SECONDS = 0.2  # Between two updates on a terminal.
_LONG_SECONDS = 2.0  # A phase that took longer prints its duration.
_LINES = 20  # Lines for a whole run where the output is not a terminal.
_UNKNOWN_TOTAL = 200  # Units after which _LINES lines are printed if the total is not known.


class ProgressDisplay:
    """A live panel above a bar on a terminal; elsewhere at most 20 lines for `total` units.

    `unit` names what is counted, such as "step". Use it as a context manager.
    """

    def __init__(self, console: Console, unit: str, total: int | None, completed: int = 0) -> None:
        self.console = console
        self._unit, self._total = unit, total
        self._progress = Progress(
            TextColumn(unit), BarColumn(), MofNCompleteColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task(unit, total=total, completed=completed)
        self._live = Live(self._progress, console=console, transient=True)
        self._lines = self._share(completed)

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

    def update(self, completed: int, text: str = "", panel: RenderableType | None = None) -> None:
        """Show the state after `completed` units: `panel`, by default `text`, or a line of text."""
        if self.is_live:
            self._progress.update(self._task, completed=completed)
            self._live.update(Group(Text(text) if panel is None else panel, self._progress))
        elif text and (self._share(completed) > self._lines or completed == self._total):
            of_total = f"/{self._total:,}" if self._total else ""
            self.print(f"{self._unit} {completed:,}{of_total}  {text}")
            self._lines = self._share(completed)

    def print(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _share(self, completed: int) -> int:
        return _LINES * completed // (self._total or _UNKNOWN_TOTAL)


@contextmanager
def show_phase(console: Console, text: str) -> Iterator[None]:
    """Show `text` while a phase runs: live on a terminal, else as a line; then a long duration."""
    started = time.perf_counter()
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        yield
    seconds = time.perf_counter() - started
    if seconds > _LONG_SECONDS:
        console.print(f"{text}: {seconds:.1f} s", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def show_sampling(
    console: Console, total: int, log_seconds: float = _LOG_SECONDS
) -> Iterator[Callable[[int], None]]:
    """Show how far a call is that samples `total` responses, for the length of a `with`.

    The function it yields is called with the number of tokens of each response. A terminal shows a
    live line, a log gets a line every `log_seconds`.
    """
    started = time.perf_counter()
    last, responses, tokens = started, 0, 0
    live = console.is_terminal
    interval = _REFRESH_SECONDS if live else log_seconds
    with console.status(f"sampling {total:,} responses") as status:

        def update(count: int) -> None:
            nonlocal last, responses, tokens
            responses, tokens = responses + 1, tokens + count
            now = time.perf_counter()
            if now - last < interval:
                return
            last, elapsed = now, now - started
            left = elapsed / responses * (total - responses)
            text = (
                f"sampling: {responses:,} of {total:,} responses, {tokens:,} tokens, "
                f"{tokens / elapsed:,.0f} tokens/s, about {left:,.0f} s left"
            )
            if live:
                status.update(text)
            else:
                console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield update
