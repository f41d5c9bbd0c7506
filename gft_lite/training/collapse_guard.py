"""The collapse guard: alarms on the metrics of steps, and what follows them.

The defaults were chosen on runs of the lab: GRPO at 8e-3 collapsed with two of three seeds, GFT at
4e-3 with one of three. Each of these had an alarm, and two healthy runs of each method had none.
Nine further runs neither collapsed nor had an alarm: GFT at 2e-3 and 4e-3 and GRPO at 4e-3 and
8e-3, with two seeds each, and SFT at 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from gft_lite.recipe.course_sections import GuardSettings

FIGURES = ("reward", "flat_groups", "entropy", "grad_norm", "engine_gap", "kl", "groups")
Figures = Mapping[str, float | None]  # Of one step; None where it has no such metric.
_LEAST_GROUPS = 20  # In a window, before all of them being flat is more than chance.


class CollapseGuard:
    """Finds new alarms step by step. Its state follows from the metrics of the steps so far.

    `compares` is false for a method without group advantages, whose groups may all be flat.
    """

    def __init__(self, settings: GuardSettings, *, compares: bool) -> None:
        self.settings = settings
        self._compares = compares
        self._steps: list[int] = []
        self._history: list[Figures] = []
        self._active: set[str] = set()
        self.rollbacks = 0

    @property
    def lr_scale(self) -> float:
        """What the learning rate is multiplied by after the rollbacks so far."""
        return float(self.settings.lr_factor**self.rollbacks)

    @property
    def action(self) -> str:
        """What follows the next alarm: after the last rollback training ends."""
        settings = self.settings
        spent = settings.action == "rollback" and self.rollbacks == settings.rollbacks
        return "stop" if spent else settings.action

    def resume(self, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Take up the metrics of the steps that a resumed run has done."""
        for step in metrics:
            self._add(step)
            self.record(step)
        self._active = set(self._find())

    def check(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """The alarms of a step that were not there at the step before, each with a text."""
        if self.settings.action == "none":
            return {}
        self._add(metrics)
        alarms = self._find()
        new = {name: text for name, text in alarms.items() if name not in self._active}
        self._active = set(alarms)
        return new

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Forget the steps that the rollback in a step's metrics, if there is one, has undone."""
        restored = metrics.get("guard", {}).get("restored")
        if restored is None:
            return
        kept = sum(step <= restored for step in self._steps)
        del self._steps[kept:], self._history[kept:]
        self._active = set()
        self.rollbacks += 1

    def _add(self, metrics: Mapping[str, Any]) -> None:
        self._steps.append(metrics["step"])
        kl = metrics.get("kl", {}).get("held_out") or {}
        self._history.append({
            "reward": metrics["reward"].get("self"),
            "flat_groups": metrics["flat_groups"] if self._compares else None,
            "entropy": metrics["entropy"],
            "grad_norm": metrics["grad_norm"],
            "engine_gap": (metrics["engine_gap"] or {}).get("mean"),
            "kl": kl.get("forward"),
            "groups": metrics["groups"],
        })  # fmt: skip

    def _find(self) -> dict[str, str]:
        return find_alarms(self._history, self.settings)


def find_alarms(history: Sequence[Figures], settings: GuardSettings) -> dict[str, str]:
    """The alarms after the last step of `history`, by name, each with a text.

    The rules are those of `GuardSettings`.
    """
    known: dict[str, list[float]] = {
        name: [value for step in history if (value := step[name]) is not None] for name in FIGURES
    }
    window = settings.window
    found = {
        "reward": _fall(known["reward"], settings.reward, window),
        "flat_groups": _flat(known, settings.flat_groups, window),
        "entropy": _rise(known["entropy"], settings.entropy, window),
        "entropy_low": _low(known["entropy"], settings.entropy_low, window),
        "grad_norm": _unusual(known["grad_norm"], settings.grad_norm, window),
        "kl": _high(known["kl"], settings.kl),
        "engine_gap": _high(known["engine_gap"], settings.engine_gap),
    }
    return {name: text for name, text in found.items() if text}


def _fall(values: Sequence[float], share: float | None, window: int) -> str | None:
    means = _window_means(values, window)
    if share is None or not means:
        return None
    best, now = max(means), means[-1]
    if not 0 < best * (1 - share) > now or best - now <= _noise(values, window):
        return None
    return f"{now:.3g} on average, from {best:.3g}"


def _flat(known: Mapping[str, Sequence[float]], share: float | None, window: int) -> str | None:
    flat, rewards = (_window_means(known[name], window) for name in ("flat_groups", "reward"))
    if share is None or not flat or sum(known["groups"][-window:]) < _LEAST_GROUPS:
        return None
    # Near the highest reward flat groups are solved ones, as at the end of a good run.
    solved = bool(rewards) and rewards[-1] > (min(rewards) + max(rewards)) / 2
    return f"{flat[-1]:.0%} of the groups" if flat[-1] >= share and not solved else None


def _rise(values: Sequence[float], factor: float | None, window: int) -> str | None:
    means = _window_means(values, window)
    if factor is None or not means:
        return None
    least, now = min(means), means[-1]
    if now < factor * least or now - least <= _noise(values, window):
        return None
    return f"{now:.3g} nats per token, from {least:.3g}"


def _low(values: Sequence[float], limit: float | None, window: int) -> str | None:
    means = _window_means(values[-window:], window)
    if limit is None or not means or means[-1] > limit:
        return None
    return f"{means[-1]:.3g} nats per token"


def _unusual(values: Sequence[float], factor: float | None, window: int) -> str | None:
    means = _window_means(values[-window:], window)
    if factor is None or not means or means[-1] < factor * median(values):
        return None
    return f"{means[-1]:.3g} on average, usually {median(values):.3g}"


def _high(values: Sequence[float], limit: float | None) -> str | None:
    if limit is None or not values or values[-1] < limit:
        return None
    return f"{values[-1]:.3g} nats per token"


def _window_means(values: Sequence[float], window: int) -> list[float]:
    """The means of all full windows of consecutive values."""
    return [fmean(values[i : i + window]) for i in range(len(values) - window + 1)]


def _noise(values: Sequence[float], window: int) -> float:
    """Five standard errors of the difference of two window means.

    The variance of a step is half of the mean square of the differences from step to step, which
    a trend hardly changes.
    """
    squares = [(b - a) ** 2 for a, b in pairwise(values)]
    return 5 * math.sqrt(fmean(squares) / window) if squares else 0.0
