"""The progress of training on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from gft_lite.recipe.figures import main_figure
from gft_lite.utils.progress import ProgressDisplay, sparkline

_FORMATS = (
    ("loss", "loss", "{:.4f}"),
    ("gradient norm", "grad_norm", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("truncated", "truncated", "{:.0%}"),
    ("skipped", "skipped", "{}"),
)


_TWO_PAIRS = 56  # Columns of a terminal from which metrics stand side by side.


@dataclass
class TimeLeft:
    """The time that a run still takes after a step: the steps left, and the evaluations to come.

    A step takes the mean of those since the start at step `first`, with all that comes between
    them, such as checkpoints. `to_come` is the number of evaluations after a step; each takes the
    mean of those that are done, `evaluation` seconds before there is one.
    """

    steps: int | None
    first: int
    to_come: Callable[[int], float]
    evaluation: float
    done: dict[int, float] = field(default_factory=dict)  # Seconds of evaluations by step.

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take up the time of the evaluation after a step, if there was one."""
        if "eval" in metrics["seconds"]:
            self.done[metrics["step"]] = metrics["seconds"]["eval"]

    def after(self, step: int, elapsed: float) -> float | None:
        """The seconds left after a step, `elapsed` seconds after the start; None if not known."""
        if self.steps is None or step <= self.first:
            return None
        own = sum(seconds for at, seconds in self.done.items() if at > self.first)
        each = fmean(self.done.values()) if self.done else self.evaluation
        steps = (elapsed - own) / (step - self.first) * (self.steps - step)
        return steps + self.to_come(step) * each


class TrainingConsole:
    """Live metrics on a terminal; elsewhere a line with the metrics of every 20th of the steps."""

    def __init__(
        self, console: Console, total: int | None, completed: int, *, compares: bool = True,
        history: Iterable[Mapping[str, Any]] = (), left: TimeLeft | None = None,
    ) -> None:  # fmt: skip
        """`compares` is false for a method without group advantages, which has no flat groups.

        `history` are the metrics of the steps before a resumption. `left` estimates the time that
        is left.
        """
        self._left = left
        self._compares, self._console = compares, console
        self._display = ProgressDisplay(console, "step", total, completed)
        self._kept: dict[str, Any] = {"kl": {}, "eval": {}, "best_step": None}
        self._evaluated = 0
        self._reward: Mapping[str, float] = {}
        self._rewards: list[float | None] = []
        self._kls: list[float | None] = []
        for metrics in history:
            self._remember(metrics)

    def __enter__(self) -> TrainingConsole:
        self._display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.__exit__(*error)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a step's metrics; on a terminal the last KL and evaluation stay until the next."""
        self._remember(metrics)
        live = self._display.is_live
        texts = _texts({**metrics, **self._kept} if live else metrics)
        if not self._compares:
            del texts["flat groups"]
        line = "  ".join(f"{name}: {text}" for name, text in texts.items())
        elapsed = self._display.elapsed
        left = self._left.after(metrics["step"], elapsed) if self._left else None
        self._display.update(metrics["step"], line, self._panel(texts) if live else None, left)

    def _remember(self, metrics: Mapping[str, Any]) -> None:
        """Keep what the panel shows of earlier steps."""
        self._kept = {name: metrics.get(name, kept) for name, kept in self._kept.items()}
        if metrics.get("eval"):
            self._evaluated = metrics["step"]
        if self._left:
            self._left.add(metrics)
        self._reward = rewards = metrics["reward"]
        trend = rewards.get("self", fmean(rewards.values()) if rewards else None)
        self._rewards.append(trend)
        if kl := [v[_kl_key(w)] for w, v in metrics.get("kl", {}).items() if v]:
            self._kls.append(kl[0])

    def _panel(self, texts: Mapping[str, str]) -> Group:
        """Trends, the last evaluation and the best step; below them all other metrics."""
        width = self._console.width
        evaluated = _evaluation_texts(self._kept["eval"])
        kls = [name for name in texts if name.startswith("KL ")]
        # The policy's own reward, whose trend this is, comes first.
        rewards = sorted(self._reward.items(), key=lambda item: item[0] != "self")
        shown = " ".join(f"{name} {value:.2f}" for name, value in rewards)
        first = {"reward": f"{self._trend(self._rewards)} {shown}"} if shown else {}
        first |= {name: texts[name] for name in kls}
        if kls:
            first[kls[0]] = f"{self._trend(self._kls)} {texts[kls[0]]}"
        first |= {name: f"{text} at step {self._evaluated:,}" for name, text in evaluated.items()}
        if self._kept["best_step"] is not None:
            first["best step"] = f"{self._kept['best_step']:,}"
        rest = [item for item in texts.items() if item[0] not in first]
        # The bar and the phase take three lines.
        room = max(0, self._console.height - len(first) - 3)
        pairs = 2 if width >= _TWO_PAIRS else 1
        rows = [rest[i : i + pairs] for i in range(0, len(rest), pairs)][:room]
        return Group(_grid([[item] for item in first.items()], width), _grid(rows, width))

    def _trend(self, values: list[float | None]) -> str:
        width = self._console.width
        return sparkline(
            values, width // (5 if width >= 90 else 8), ascii_only=self._console.options.ascii_only
        )


def _texts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Names and values of a step's most important metrics, and of all that the loss reports."""
    rewards = " ".join(f"{name} {value:.2f}" for name, value in metrics["reward"].items())
    texts = {"reward": rewards} if rewards else {}
    texts["flat groups"] = f"{metrics['flat_groups']:.0%}"
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
            texts[f"KL {where.replace('_', ' ')}"] = f"{values[_kl_key(where)]:.4f}"
    texts |= _evaluation_texts(metrics.get("eval", {}))
    for phase, key in (("rollout", "rollout_tokens"), ("train", "trained_tokens")):
        if metrics[key] and metrics["seconds"].get(phase):
            texts[f"{phase} tokens/s"] = f"{metrics[key] / metrics['seconds'][phase]:,.0f}"
    return texts


def _kl_key(where: str) -> str:
    """The direction of the KL that is shown for a set of responses."""
    return "forward" if where == "held_out" else "reverse"


def evaluation_line(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The main figure of each evaluated set with its interval."""
    return ", ".join(f"{name} {text}" for name, text in _evaluation_texts(figures).items())


def _evaluation_texts(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    texts = {}
    for name, of_set in figures.items():
        main = main_figure(of_set)
        low, high = of_set[f"{main}_interval"]
        texts[f"{name}/{main}"] = f"{of_set[main]:.3f} [{low:.3f}, {high:.3f}]"
    return texts


def _grid(rows: Sequence[Sequence[tuple[str, str]]], width: int) -> Table:
    """Rows of pairs of a name and a value, on `width` columns; what is longer is cut."""
    table = Table.grid(padding=(0, 2, 0, 0))
    pairs = max(map(len, rows), default=1)
    longest = max((len(name) for row in rows for name, _ in row), default=0)
    half = width // pairs
    left = min(longest, half // 2 if pairs == 1 else half - 12)
    for _ in range(pairs):
        table.add_column(width=left, no_wrap=True, overflow="ellipsis", style="dim")
        # Two spaces stand between all columns.
        right = max(4, half - left - pairs - 1)
        table.add_column(width=right, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(text) for pair in row for text in pair))
    return table
