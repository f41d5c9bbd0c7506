"""TODO: gft_lite/distillation/console.py"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gft_lite.distillation.progress import Distillation

# --- what is shown ---------------------------------------------------------------------------


class DistillConsole:
    """Live progress on a terminal; a line now and then where there is none."""

    def __init__(self, console: Console, work: Distillation) -> None:
        self._console, self._work = console, work
        self._told = 0
        self._progress = Progress(
            TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=console,
            transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=len(work.questions))

    def __enter__(self) -> DistillConsole:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self) -> None:
        """Show how far it is."""
        done, total = len(self._work.graded), len(self._work.questions)
        text = f"right {self._work.right / done:.0%}" if done else ""
        if (cost := self._work.cost()) is not None:
            text += f"  ${cost:,.2f}"
        if self._work.failures:
            text += f"  failed {self._work.failures.total():,}"
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done, description=text)
        elif (share := 20 * done // total) > self._told:
            self._told = share
            self._console.print(f"{done:,} of {total:,} answers  {text}", markup=False)


def table(summary: Mapping[str, Any]) -> Table:
    """The figures worth reading."""
    shown = {name: f"{summary[name]:,}" for name in _SHOWN}
    if summary["acceptance"] is not None:
        shown["right"] += f" ({summary['acceptance']:.1%} of the answers)"
    shown["seconds"] = f"{summary['seconds']:,.0f}"
    shown["answer tokens a second"] = f"{summary['tokens_per_second']:,.0f}"
    if summary["cost"] is not None:
        shown["cost"] = f"${summary['cost']:,.4f}"
    title = escape(f"{summary['file']}: {summary['teacher']}")
    made = Table(title=title, show_header=False)
    for name, value in shown.items():
        made.add_row(name.replace("_", " "), value)
    return made


_SHOWN = (
    "problems", "asked", "reused", "answered", "failed", "right", "problems_without_right_answer",
    "offered", "duplicates", "truncated", "empty", "prompt_tokens", "completion_tokens",
)  # fmt: skip
