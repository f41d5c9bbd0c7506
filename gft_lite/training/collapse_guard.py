"""The collapse guard: alarms on the metrics of steps, and what follows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from gft_lite.recipe.training_sections import GuardSettings

Figures = Mapping[str, float | None]  # Of one step; None where it has no such metric.


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
        })  # fmt: skip

    def _find(self) -> dict[str, str]:
        return find_alarms(self._history, self.settings)


def find_alarms(history: Sequence[Figures], settings: GuardSettings) -> dict[str, str]:
    """The alarms after the last step of `history`, by name, each with a text.

    The rules are those of `GuardSettings`.
    """
    known = {
        name: [step[name] for step in history if step[name] is not None]
        for name in ("reward", "flat_groups", "entropy", "grad_norm", "engine_gap", "kl")
    }
    means = {name: _window_means(values, settings.window) for name, values in known.items()}
    alarms = {}

    def alarm(name: str, found: bool, text: str) -> None:
        if found:
            alarms[name] = text

    s, reward, flat, entropy, norm = (
        settings, means["reward"], means["flat_groups"], means["entropy"], means["grad_norm"],
    )  # fmt: skip
    if reward:
        best, now = max(reward), reward[-1]
        below = bool(s.reward) and best > 0 and now < (1 - (s.reward or 0)) * best
        alarm("reward", below, f"{now:.3g} on average, from {best:.3g}")
        if flat and s.flat_groups:
            fallen = flat[-1] >= s.flat_groups and now < best
            alarm("flat_groups", fallen, f"{flat[-1]:.0%} of the groups")
    if entropy:
        least, now = min(entropy), entropy[-1]
        rise = bool(s.entropy) and now >= (s.entropy or 0) * least
        alarm("entropy", rise, f"{now:.3g} nats per token, from {least:.3g}")
        alarm("entropy_low", bool(s.entropy_low) and now <= (s.entropy_low or 0),
              f"{now:.3g} nats per token")  # fmt: skip
    if norm and s.grad_norm:
        usual = median(known["grad_norm"])
        alarm("grad_norm", norm[-1] >= s.grad_norm * usual,
              f"{norm[-1]:.3g} on average, usually {usual:.3g}")  # fmt: skip
    for name, limit in (("kl", s.kl), ("engine_gap", s.engine_gap)):
        if limit and known[name]:
            alarm(name, known[name][-1] >= limit, f"{known[name][-1]:.3g} nats per token")
    return alarms


def _window_means(values: Sequence[float], window: int) -> list[float]:
    """The means of all full windows of consecutive values."""
    return [fmean(values[i : i + window]) for i in range(len(values) - window + 1)]
