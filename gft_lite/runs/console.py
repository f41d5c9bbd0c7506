"""TODO: gft_lite/runs/console.py"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class TrainingConsole:
    """Live progress on a terminal; a line now and then where there is none."""

    def __init__(self, console: Console, total: int | None, done: int) -> None:
        self.console = console
        self._total = total
        self._every = max(1, (total or 200) // 20)
        self._progress = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("steps", total=total, completed=done)
        self._live = Live(self._progress, console=console, transient=True)
        self._kl: Mapping[str, Any] = {}

    def __enter__(self) -> TrainingConsole:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a step's metrics, and the last KL until there is a newer one."""
        self._kl = metrics.get("kl", self._kl)
        if self.console.is_terminal:
            self._progress.update(self._task, completed=metrics["step"])
            self._live.update(Stack(_panel({**metrics, "kl": self._kl}), self._progress))
        elif metrics["step"] % self._every == 0 or metrics["step"] == self._total:
            line = "  ".join(f"{name}: {value}" for name, value in _shown(metrics).items())
            step = f"step {metrics['step']}" + (f"/{self._total}" if self._total else "")
            self.console.print(f"{step}  {line}", markup=False, soft_wrap=True)


def _shown(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The figures worth watching, as text."""
    rewards = " ".join(f"{name} {value:.2f}" for name, value in metrics["reward"].items())
    shown = {"reward": rewards, "flat groups": f"{metrics['flat_groups']:.0%}"}
    for name, key, form in (
        ("rectified tokens", "rectified", "{:.0%}"),
        ("loss", "loss", "{:.4f}"),
        ("gradient norm", "grad_norm", "{:.3f}"),
        ("entropy", "entropy", "{:.3f}"),
        ("truncated", "truncated", "{:.0%}"),
        ("skipped", "skipped", "{}"),
    ):
        if metrics.get(key) is not None:
            shown[name] = form.format(metrics[key])
    for where, values in metrics.get("kl", {}).items():
        if values:
            key = "forward" if where == "held_out" else "reverse"
            shown[f"KL {where.replace('_', ' ')}"] = f"{values[key]:.4f}"
    for phase, key in (("rollout", "rollout_tokens"), ("train", "trained_tokens")):
        if metrics[key] and metrics["seconds"].get(phase):
            shown[f"{phase} tokens/s"] = f"{metrics[key] / metrics['seconds'][phase]:,.0f}"
    return shown


def _panel(metrics: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in _shown(metrics).items():
        table.add_row(name, value)
    return table
