"""The progress of training on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from gft_lite.utils.progress import ProgressDisplay

_FORMATS = (
    ("loss", "loss", "{:.4f}"),
    ("gradient norm", "grad_norm", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("truncated", "truncated", "{:.0%}"),
    ("skipped", "skipped", "{}"),
)


class TrainingConsole:
    """Live metrics on a terminal; elsewhere a line with the metrics of every 20th of the steps."""

    def __init__(
        self, console: Console, total: int | None, completed: int, *, compares: bool = True
    ) -> None:
        """`compares` is false for a method without group advantages, which has no flat groups."""
        self._compares = compares
        self._display = ProgressDisplay(console, "step", total, completed)
        self._kept: dict[str, Any] = {"kl": {}, "eval": {}}

    def __enter__(self) -> TrainingConsole:
        self._display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.__exit__(*error)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a step's metrics; on a terminal the last KL and evaluation stay until the next."""
        self._kept = {name: metrics.get(name, kept) for name, kept in self._kept.items()}
        live = self._display.is_live
        texts = _texts({**metrics, **self._kept} if live else metrics)
        if not self._compares:
            del texts["flat groups"]
        line = "  ".join(f"{name}: {text}" for name, text in texts.items())
        self._display.update(metrics["step"], line, _panel(texts) if live else None)


def _texts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Names and values of a step's most important metrics, and of all that the loss reports."""
    rewards = " ".join(f"{name} {value:.2f}" for name, value in metrics["reward"].items())
    texts = {"reward": rewards, "flat groups": f"{metrics['flat_groups']:.0%}"}
    if metrics.get("rectified") is not None:
        texts["rectified tokens"] = f"{metrics['rectified']:.0%}"
    for name, value in metrics.get("objective", {}).items():
        if name != "rectified" and value is not None:
            texts[name.replace("_", " ")] = f"{value:.4g}"
    for name, key, form in _FORMATS:
        if metrics.get(key) is not None:
            texts[name] = form.format(metrics[key])
    if gap := metrics.get("engine_gap"):
        texts["engine gap"] = f"{gap['mean']:.2g}"
    for where, values in metrics.get("kl", {}).items():
        if values:
            key = "forward" if where == "held_out" else "reverse"
            texts[f"KL {where.replace('_', ' ')}"] = f"{values[key]:.4f}"
    texts |= _evaluation_texts(metrics.get("eval", {}))
    for phase, key in (("rollout", "rollout_tokens"), ("train", "trained_tokens")):
        if metrics[key] and metrics["seconds"].get(phase):
            texts[f"{phase} tokens/s"] = f"{metrics[key] / metrics['seconds'][phase]:,.0f}"
    return texts


def evaluation_line(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The main figure of each evaluated set with its interval."""
    return ", ".join(f"{name} {text}" for name, text in _evaluation_texts(figures).items())


def _evaluation_texts(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    texts = {}
    for name, of_set in figures.items():
        interval = next(key for key in of_set if key.endswith("_interval"))
        main, (low, high) = interval.removesuffix("_interval"), of_set[interval]
        texts[f"{name}/{main}"] = f"{of_set[main]:.3f} [{low:.3f}, {high:.3f}]"
    return texts


def _panel(texts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, text in texts.items():
        table.add_row(name, text)
    return table
