"""The plots of a comparison: accuracy against cost, retention and KL, and the tuning curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from gft_lite.experiments.outcomes import Comparison, Outcome
from gft_lite.experiments.referee_tables import (
    base_scores,
    pareto_front,
    set_means,
    tuning_curves,
)
from gft_lite.report.curves import BASE, SHARE, Curve, Plot, slug

_Read = Callable[[Outcome], float | None]


def quality_plots(comparison: Comparison) -> list[Plot]:
    """Scatters of the headline score over trained tokens, seconds, each retention set and KL.

    Figures that fewer than two methods have are left out.
    """
    base = base_scores(comparison)
    axes: list[tuple[str, str, str, _Read, float | None]] = [
        ("tokens", "trained tokens", "trained tokens", lambda o: o.cost.trained_tokens, None),
        ("seconds", "time", "seconds", lambda o: o.cost.seconds.get("total"), None),
    ]
    axes += [
        (f"retention-{slug(name)}", f"retention on {name}", f"{name}, percent",
         lambda o, name=name: _percent(set_means(o.scores).get(name)),  # type: ignore[misc]
         _percent(base.get(name)))
        for name in comparison.retention
    ]  # fmt: skip
    axes.append(("kl", "KL to the base", "KL, nats per token", lambda o: o.kl, 0.0))
    plots = [_scatter(comparison, *axis) for axis in axes]
    return [plot for plot in plots if plot]


def _scatter(
    comparison: Comparison, name: str, title: str, x_label: str, read: _Read, base_x: float | None
) -> Plot | None:
    """The headline score over another figure; the base where both of its figures are known."""
    headline = comparison.headline
    curves: list[Curve] = []
    places: dict[str, tuple[float, float]] = {}
    for color, method in enumerate(comparison.methods):
        found = [
            (x, y)
            for outcome in comparison.outcomes
            if outcome.method == method
            and (x := read(outcome)) is not None
            and (y := set_means(outcome.scores).get(headline)) is not None
        ]
        if found:
            mean = fmean(x for x, _ in found), fmean(y for _, y in found)
            places[method] = mean
            across, up = zip(mean, *found, strict=True)
            curves.append(Curve(method, color, across, up))
    if len(places) < 2:
        return None
    front = pareto_front(places, less_is_better=not name.startswith("retention-"))
    curves = [
        Curve(c.label, c.color, c.x, c.y, rings=(0,)) if c.label in front else c for c in curves
    ]
    base_y = base_scores(comparison).get(headline)
    if base_x is not None and base_y is not None:
        curves.append(Curve("base", BASE, (base_x,), (base_y,)))
    return Plot(
        f"accuracy-{name}", f"{headline} against {title}", x_label, headline, tuple(curves), SHARE,
        by_series=True, scatter=True, front=sorted(places[method] for method in front),
    )  # fmt: skip


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def tuning_plots(comparison: Comparison) -> list[Plot]:
    """The score on the tuning set over the values of each tuned field, a curve for each method."""
    by_field: dict[str, list[Curve]] = {}
    for (method, field), points in tuning_curves(comparison).items():
        values = [point.settings.get(field) for point in points]
        numbers = [value for value in values if isinstance(value, int | float)]
        if len(numbers) < len(values) or method not in comparison.methods:
            continue
        color = comparison.methods.index(method)
        rings = [i for i, p in enumerate(points) if p.chosen and p.score is not None]
        scores = [point.score for point in points]
        by_field.setdefault(field, []).append(Curve(method, color, numbers, scores, rings=rings))
    return [_tuning_plot(field, curves) for field, curves in by_field.items()]


def _tuning_plot(field: str, curves: Sequence[Curve]) -> Plot:
    x = sorted({value for curve in curves for value in curve.x})
    return Plot(
        f"tuning-{slug(field)}", f"Tuning of {field}", field, "score on the tuning set",
        tuple(curves), SHARE, points=True, by_series=True,
        log_x=x[0] > 0 and x[-1] / x[0] >= 8,
    )  # fmt: skip
