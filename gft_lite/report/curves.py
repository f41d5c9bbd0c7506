"""What a report plots, as plain numbers: the figures of steps, and pass@k."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gft_lite.objective.methods import find_method
from gft_lite.report.loading import Run, Series, Sweep
from gft_lite.utils.statistics import mean_pass_at_k

Metrics = Mapping[str, Any]
Values = dict[str, float | None]
SHARE, NUMBER = "share", "number"
BASE = -1  # The colour of what no training has touched.


@dataclass(frozen=True, slots=True)
class Curve:
    """A line with the range around it; None is a gap. `colour` is a place in the palette."""

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """One pair of axes.

    `points` are single measurements, drawn with markers and error bars. `second` has an axis of
    its own at the right. `by_series` says that the colours are those of the page's series.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    unit: str = NUMBER
    points: bool = False
    log_x: bool = False
    second: Curve | None = None
    by_series: bool = False


def step_plots(series: Sequence[Series]) -> list[Plot]:
    """The metrics against the step: sources together for a single series, else series together."""
    single = len(series) == 1
    return [
        plot
        for metric in _METRICS
        for plot in (_together(metric, series[0]) if single else _apart(metric, series))
    ]


@dataclass(frozen=True, slots=True)
class _Metric:
    """A figure of a step, in parts where it has several; `read` finds them in the metrics."""

    name: str
    title: str
    y_label: str
    read: Callable[[Run, Metrics], Values]
    unit: str = NUMBER


def _named(key: str) -> Callable[[Run, Metrics], Values]:
    return lambda run, metrics: {"": metrics.get(key)}


def _flat_groups(run: Run, metrics: Metrics) -> Values:
    compared = find_method(run.recipe.method).group_advantages
    return {"": metrics.get("flat_groups") if compared else None}


def _kl(run: Run, metrics: Metrics) -> Values:
    kl = metrics.get("kl", {})
    return {
        "held out, KL(reference || policy)": kl.get("held_out", {}).get("forward"),
        "own samples, KL(policy || reference)": kl.get("rollouts", {}).get("reverse"),
    }


def _speed(run: Run, metrics: Metrics) -> Values:
    seconds = metrics["seconds"]
    return {
        phase: metrics[tokens] / seconds[phase] if metrics[tokens] and seconds.get(phase) else None
        for phase, tokens in (("rollout", "rollout_tokens"), ("train", "trained_tokens"))
    }


def _memory(run: Run, metrics: Metrics) -> Values:
    peak = metrics.get("peak_memory")
    return {"": None if peak is None else peak / 2**30}


_METRICS = (
    _Metric("reward", "Reward by source", "mean reward", lambda run, m: dict(m["reward"])),
    _Metric("rectified", "Rectified tokens (p < tau)", "share", _named("rectified"), SHARE),
    _Metric("flat-groups", "Flat groups (all rewards equal)", "share", _flat_groups, SHARE),
    _Metric("kl", "KL to the reference", "nats per token", _kl),
    _Metric("entropy", "Entropy", "nats per token", _named("entropy")),
    _Metric("gradient-norm", "Gradient norm", "before clipping", _named("grad_norm")),
    _Metric("loss", "Loss", "", _named("loss")),
    _Metric("truncated", "Responses cut by the length limit", "share", _named("truncated"), SHARE),
    _Metric("speed", "Speed", "tokens per second", _speed),
    _Metric("memory", "Peak memory", "GiB", _memory),
)


def _together(metric: _Metric, series: Series) -> Iterable[Plot]:
    """One plot, a curve for each part."""
    parts = _parts(metric, [series])
    curves = tuple(
        _over_steps(metric, part, series, colour, part) for colour, part in enumerate(parts)
    )
    if curves:
        yield Plot(metric.name, metric.title, "step", metric.y_label, curves, metric.unit)


def _apart(metric: _Metric, series: Sequence[Series]) -> Iterable[Plot]:
    """A plot for each part, a curve for each series."""
    for part in _parts(metric, series):
        curves = tuple(
            _over_steps(metric, part, one, colour, one.label) for colour, one in enumerate(series)
        )
        name = f"{metric.name}-{slug(part)}" if part else metric.name
        title = f"{metric.title}: {part}" if part else metric.title
        yield Plot(name, title, "step", metric.y_label, curves, metric.unit, by_series=True)


def _parts(metric: _Metric, series: Iterable[Series]) -> list[str]:
    """The parts for which any step of any run has a value."""
    steps = ((run, m) for one in series for run in one.runs for m in run.metrics)
    found = (part for run, m in steps for part, v in metric.read(run, m).items() if v is not None)
    return list(dict.fromkeys(found))


def _over_steps(metric: _Metric, part: str, series: Series, colour: int, label: str) -> Curve:
    """A curve of the mean over the series' runs, and from the lowest to the highest of them."""
    by_step: dict[int, list[float]] = {}
    for run in series.runs:
        for m in run.metrics:
            values = by_step.setdefault(m["step"], [])
            value = metric.read(run, m).get(part)
            values += [] if value is None else [value]
    steps = sorted(by_step)
    if metric.name == "kl":  # Measured now and then: a line from one measurement to the next.
        steps = [step for step in steps if by_step[step]]
    y = [fmean(by_step[step]) if by_step[step] else None for step in steps]
    if len(series.runs) == 1:
        return Curve(label, colour, steps, y)
    low = [min(by_step[step], default=None) for step in steps]
    high = [max(by_step[step], default=None) for step in steps]
    return Curve(label, colour, steps, y, low, high)


def slug(text: str) -> str:
    """`text` as part of a file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).lower().split())


# --- pass@k ----------------------------------------------------------------------------------


def pass_at_k_plots(series: Sequence[Series]) -> list[Plot]:
    """pass@k against k on each evaluated set, the base of the first series beside the trained."""
    sets = dict.fromkeys(
        name for one in series for run in one.runs for name in run.evals.get("trained", {})
    )
    plots = []
    for name in sets:
        curves = [_pass_at_k(one, name, "trained", c) for c, one in enumerate(series)]
        base = _pass_at_k(series[0], name, "base", BASE)
        kept = tuple(curve for curve in (base, *curves) if curve and len(curve.x) > 1)
        if kept:
            title = f"pass@k on {name} (dashed: base)"
            plots.append(
                Plot(f"pass-at-k-{slug(name)}", title, "k", "pass@k", kept, SHARE, points=True,
                     log_x=True, by_series=len(series) > 1)
            )  # fmt: skip
    return plots


def _pass_at_k(series: Series, name: str, which: str, colour: int) -> Curve | None:
    found = [run.evals[which][name] for run in series.runs if name in run.evals.get(which, {})]
    if not found:
        return None
    samples = min(sample_count(figures) for figures in found)
    ks = [2**i for i in range(samples.bit_length())]
    y = [fmean(mean_pass_at_k(counts(figures), k) for figures in found) for k in ks]
    label = "base" if which == "base" else series.label
    return Curve(label, colour, ks, y)


def sample_count(figures: Metrics) -> int:
    """The samples of each problem of an evaluated set."""
    return round(figures["samples"] / figures["problems"])


def counts(figures: Metrics) -> list[tuple[int, int]]:
    """(samples, right ones) of each problem of an evaluated set."""
    samples = sample_count(figures)
    return [(samples, correct) for correct in figures["correct"].values()]


# --- sweeps ----------------------------------------------------------------------------------


def sweep_plot(sweep: Sweep) -> Plot | None:
    """Accuracy against the one numeric field of a sweep, the rectified share at the right."""
    points = [point for point in sweep.points if "pass@1" in point.figures]
    if len(points) < 2 or len(sweep.fields) != 1:
        return None
    [field] = sweep.fields
    if not all(type(point.settings[field]) in (int, float) for point in points):
        return None
    points.sort(key=lambda point: point.settings[field])
    x = [point.settings[field] for point in points]
    mean, low, high = ([p.figures["pass@1"][part] for p in points] for part in _PARTS)
    shares = [point.figures.get("rectified", {}).get("mean") for point in points]
    return Plot(
        name=f"sweep-{slug(sweep.label)}",
        title=f"Accuracy against {field.rpartition('.')[2]}",
        x_label=field,
        y_label="pass@1",
        curves=(Curve("pass@1", 0, x, mean, low, high),),
        unit=SHARE,
        points=True,
        log_x=x[0] > 0 and x[-1] / x[0] >= 50,
        second=Curve("rectified tokens", 1, x, shares) if any(shares) else None,
    )


_PARTS = ("mean", "low", "high")
