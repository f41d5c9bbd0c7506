"""Console output of `gft-lite distill`: the progress text and the table of the summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from gft_lite.distillation.progress import Distillation


def progress_text(state: Distillation) -> str:
    """Accuracy, cost and failures so far."""
    text, done, right = "", len(state.graded), state.right
    if done and right is not None:
        text = f"right {right / done:.0%}"
    elif (mean := state.mean_reward()) is not None:
        text = f"mean reward {mean:.3g}"
    if (cost := state.cost()) is not None:
        text += f"  ${cost:,.2f}"
    if state.failures:
        text += f"  failed {state.failures.total():,}"
    return text


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The summary of a distillation as a table for the terminal."""
    cells = {name: f"{summary[name]:,}" for name in _COUNTS if summary[name] is not None}
    if summary["acceptance"] is not None:
        cells["right"] += f" ({summary['acceptance']:.1%} of the answers)"
    elif summary["mean_reward"] is not None:
        cells["mean reward"] = f"{summary['mean_reward']:.3g}"
    cells["seconds"] = f"{summary['seconds']:,.0f}"
    cells["answer tokens a second"] = f"{summary['tokens_per_second']:,.0f}"
    if summary["cost"] is not None:
        cells["cost"] = f"${summary['cost']:,.4f}"
    title = escape(f"{summary['file']}: {summary['teacher']}")
    table = Table(title=title, show_header=False)
    for name, cell in cells.items():
        table.add_row(name.replace("_", " "), cell)
    return table


_COUNTS = (
    "problems", "asked", "reused", "answered", "failed", "right", "problems_without_right_answer",
    "offered", "duplicates", "truncated", "empty", "unusable", "prompt_tokens", "completion_tokens",
)  # fmt: skip
