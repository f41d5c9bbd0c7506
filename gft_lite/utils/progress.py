"""Progress on a terminal, or as lines where the output is not a terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

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
