"""Quality and cost of the methods of a comparison as means over runs, and as tables of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gft_lite.experiments.outcomes import Comparison, Outcome, TuningPoint
from gft_lite.experiments.verdict import MANY, Verdict, p_text, points, verdict_table
from gft_lite.utils.tables import Table

BASE = "before training"


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over the finished runs of a method; None for what no run knows.

    `scores` are means over the problems of a set, `seconds` are by phase.
    """

    method: str
    runs: int
    scores: Mapping[str, float]
    lowest: Mapping[str, float]
    highest: Mapping[str, float]
    kl: float | None
    trajectories: float | None
    trained_tokens: float | None
    rollout_tokens: float | None
    seconds: Mapping[str, float]
    peak_memory: float | None


def summaries(comparison: Comparison) -> dict[str, Summary]:
    """The summary of each method, also of those without a finished run."""
    return {
        method: _summary(method, [o for o in comparison.outcomes if o.method == method])
        for method in comparison.methods
    }


def _summary(method: str, outcomes: Sequence[Outcome]) -> Summary:
    scores = _by_set(set_means(o.scores) for o in outcomes)
    costs = [outcome.cost for outcome in outcomes]
    phases = dict.fromkeys(phase for cost in costs for phase in cost.seconds)
    return Summary(
        method=method,
        runs=len(outcomes),
        scores={name: fmean(values) for name, values in scores.items()},
        lowest={name: min(values) for name, values in scores.items()},
        highest={name: max(values) for name, values in scores.items()},
        kl=_mean(o.kl for o in outcomes),
        trajectories=_mean(cost.trajectories for cost in costs),
        trained_tokens=_mean(cost.trained_tokens for cost in costs),
        rollout_tokens=_mean(cost.rollout_tokens for cost in costs),
        seconds={p: fmean(cost.seconds.get(p, 0.0) for cost in costs) for p in phases},
        peak_memory=max((c.peak_memory for c in costs if c.peak_memory is not None), default=None),
    )


def base_scores(comparison: Comparison) -> dict[str, float]:
    """The mean scores of the policies before training, over the base models."""
    by_base: dict[str, dict[str, float]] = {}
    for outcome in comparison.outcomes:
        by_base.setdefault(outcome.base, {}).update(set_means(outcome.base_scores))
    return {name: fmean(values) for name, values in _by_set(by_base.values()).items()}


def set_means(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over the problems of each evaluation set."""
    return {name: fmean(values.values()) for name, values in scores.items() if values}


def _by_set(found: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for means in found:
        for name, value in means.items():
            values.setdefault(name, []).append(value)
    return values


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def settings_text(settings: Mapping[str, Any]) -> str:
    """Tuned fields with their values."""
    return ", ".join(f"{field} = {value}" for field, value in settings.items()) or "-"


# --- tuning ----------------------------------------------------------------------------------


def tuning_curves(comparison: Comparison) -> dict[tuple[str, str], list[TuningPoint]]:
    """The points that were tried, by method and field, in the order of their values."""
    curves: dict[tuple[str, str], list[TuningPoint]] = {}
    for point in comparison.tuning:
        curves.setdefault((point.method, point.field), []).append(point)
    return {key: sorted(curve, key=_place) for key, curve in curves.items()}


def _place(point: TuningPoint) -> tuple[bool, float, str]:
    value = point.settings.get(point.field)
    if isinstance(value, int | float):
        return False, float(value), ""
    return True, 0.0, str(value)


def edges(comparison: Comparison) -> list[str]:
    """A sentence for each chosen value at the edge of those that were tried, or one for many."""
    found: list[tuple[str, str, str, str]] = []
    for (method, field), curve in tuning_curves(comparison).items():
        values = [point.settings.get(field) for point in curve]
        numbers = [value for value in values if isinstance(value, int | float)]
        chosen = [p.settings.get(field) for p in curve if p.chosen]
        if len(set(numbers)) < 2 or len(numbers) < len(values):
            continue
        for i, edge, other in ((0, "lowest", "lower"), (-1, "highest", "higher")):
            value = numbers[i]
            if value in chosen:
                found.append((method, f"{field} = {value:g}", edge, other))
    if len(found) <= MANY:
        return [
            f"{method}: {setting}, the best, is the {edge} value that was tried. A {other} one may "
            "be better."
            for method, setting, edge, other in found
        ]
    parts = [
        f"the {edge} that was tried for "
        + ", ".join(f"{method} ({setting})" for method, setting, of, _ in found if of == edge)
        for edge in sorted({edge for _, _, edge, _ in found})
    ]
    return [f"The best value is {'; '.join(parts)}. Values beyond may be better."]


# --- Pareto fronts ---------------------------------------------------------------------------


def pareto_front(
    places: Mapping[str, tuple[float, float]], *, less_is_better: bool
) -> tuple[str, ...]:
    """The methods that no other beats in both figures: the second is better if it is higher."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        x, y = (b[0] - a[0] if less_is_better else a[0] - b[0]), a[1] - b[1]
        return x >= 0 and y >= 0 and (x > 0 or y > 0)

    return tuple(
        name for name, place in places.items()
        if not any(beats(other, place) for other in places.values())
    )  # fmt: skip


# --- tables ----------------------------------------------------------------------------------


def tables(comparison: Comparison, found: Mapping[str, Sequence[Verdict]]) -> list[Table]:
    """All tables of a comparison: verdicts, quality, cost, seconds, tuning, failures, runs."""
    made = [verdict_table(comparison, verdicts) for verdicts in found.values() if verdicts]
    by_method = summaries(comparison)
    made += [_quality(comparison, by_method), _cost(by_method), _seconds(by_method)]
    return [*made, *filter(None, (_tuning(comparison), _failures(comparison)))]


def main_table(comparison: Comparison, found: Mapping[str, Sequence[Verdict]]) -> Table:
    """The table for a paper: the verdict, quality and cost of each method."""
    sets = (comparison.headline, *comparison.retention)
    header = ("method", "verdict", "difference", "95% interval", "p", *sets, "KL",
              "trained tokens", "rollout tokens", "seconds")  # fmt: skip
    verdicts = {verdict.method: verdict for verdict in found[comparison.headline]}
    rows = []
    for method, summary in summaries(comparison).items():
        verdict = verdicts.get(method)
        rows.append((method, *_verdict_cells(verdict, summary), *_scores(summary.scores, sets),
                     _number(summary.kl), *_cost_cells(summary)))  # fmt: skip
    rows.append((BASE, *["-"] * 4, *_scores(base_scores(comparison), sets), *["-"] * 4))
    title = f"{comparison.name}: compared with {comparison.against} on {comparison.headline}"
    return Table(title, header, tuple(rows), labels=2)


def _verdict_cells(verdict: Verdict | None, summary: Summary) -> tuple[str, ...]:
    if verdict is None:
        return "reference" if summary.runs else "failed", "-", "-", "-"
    word = verdict.word if summary.runs else "failed"
    if verdict.difference is None:
        return word, "-", "-", "-"
    interval = "-"
    if verdict.low is not None and verdict.high is not None:
        interval = f"{points(verdict.low)} to {points(verdict.high)}"
    return word, points(verdict.difference), interval, p_text(verdict.p)


def _scores(scores: Mapping[str, float], sets: Sequence[str]) -> list[str]:
    return [f"{100 * scores[name]:.1f}" if name in scores else "-" for name in sets]


def _cost_cells(summary: Summary) -> tuple[str, ...]:
    seconds = summary.seconds.get("total")
    return (
        _count(summary.trained_tokens), _count(summary.rollout_tokens),
        "-" if seconds is None else f"{seconds:,.0f}",
    )  # fmt: skip


def _quality(comparison: Comparison, by_method: Mapping[str, Summary]) -> Table:
    sets = (comparison.headline, *comparison.retention)
    rows = [
        (m, *(_spread(s, name) for name in sets), _number(s.kl), str(s.runs))
        for m, s in by_method.items()
    ]
    rows.append((BASE, *_scores(base_scores(comparison), sets), "-", "-"))
    title = "Scores in percent: means over runs, with the lowest and the highest run"
    return Table(title, ("method", *sets, "KL, nats per token", "runs"), tuple(rows))


def _spread(summary: Summary, name: str) -> str:
    if name not in summary.scores:
        return "-"
    mean, low, high = (
        f"{100 * side[name]:.1f}" for side in (summary.scores, summary.lowest, summary.highest)
    )
    return mean if summary.runs < 2 else f"{mean} ({low} to {high})"


def _cost(by_method: Mapping[str, Summary]) -> Table:
    rows = tuple(
        (method, _count(s.trajectories), *_cost_cells(s),
         "-" if s.peak_memory is None else f"{s.peak_memory:.2f} GiB")
        for method, s in by_method.items()
    )  # fmt: skip
    header = ("method", "responses", "trained tokens", "rollout tokens", "seconds", "peak memory")
    return Table("Cost of a run: means over runs, highest memory", header, rows)


def _seconds(by_method: Mapping[str, Summary]) -> Table:
    phases = dict.fromkeys(phase for s in by_method.values() for phase in s.seconds)
    rows = tuple(
        (m, *(f"{s.seconds[p]:,.1f}" if p in s.seconds else "-" for p in phases))
        for m, s in by_method.items()
    )
    return Table("Seconds by phase", ("method", *phases), rows)


def _tuning(comparison: Comparison) -> Table | None:
    rows = tuple(
        (method, field, str(point.settings.get(field)),
         "failed" if point.score is None else f"{100 * point.score:.1f}",
         "chosen" if point.chosen else "")
        for (method, field), curve in tuning_curves(comparison).items() for point in curve
    )  # fmt: skip
    header = ("method", "field", "value", "score on the tuning set", "")
    return Table("Tuning", header, rows, labels=2) if rows else None


def _failures(comparison: Comparison) -> Table | None:
    rows = tuple((f.method, f.part, f.run, f.reason) for f in comparison.failures)
    header = ("method", "part", "run", "reason")
    return Table("Runs that failed", header, rows, labels=4) if rows else None


def _or_dash(form: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else form(value)


_count = _or_dash(lambda value: f"{value:,.0f}")
_number = _or_dash(lambda value: f"{value:.3g}")
