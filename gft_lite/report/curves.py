"""The plots of a report as plain numbers: metrics over steps, pass@k, sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from gft_lite.objective.methods import METHODS
from gft_lite.recipe.figures import figure_of, label_of, main_figure
from gft_lite.report.loading import (
    Metrics,
    Run,
    Series,
    Sweep,
    objective_metrics,
    objective_names,
)
from gft_lite.utils.statistics import mean_pass_at_k

Values = dict[str, float | None]
SHARE, NUMBER = "share", "number"
BASE = -1  # The color of the base.
_STYLES = ("solid", "dashed", "dotted", "dash-dotted")


@dataclass(frozen=True, slots=True)
class Curve:
    """A line with a range around it; None is a gap. `color` is an index of the palette.

    `rings` are the places of the values with a ring around them; `dash` is an index of the line
    styles.
    """

    label: str
    color: int
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    rings: Sequence[int] = ()
    dash: int = 0


@dataclass(frozen=True, slots=True)
class Plot:
    """One pair of axes.

    With `points`, values are single measurements, drawn with markers and error bars. `second` has
    its own axis on the right. With `by_series`, the colors are those of the page's series. In a
    `scatter`, the first value of a curve is a labelled mean and the others are what it is the mean
    of; `front` is a line through some means, as x and y.
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
    scatter: bool = False
    front: Sequence[tuple[float, float]] = ()


def step_plots(series: Sequence[Series]) -> list[Plot]:
    """Plots of the metrics over steps.

    For a single series, the parts of a metric share a plot; otherwise the series share plots, in
    which the sources of a reward have different lines.
    """
    single = len(series) == 1
    runs = [run for one in series for run in one.runs]
    reward, *others = _METRICS
    metrics = [reward, *map(_objective_metric, objective_names(runs)), *others]
    return [
        plot
        for metric in metrics
        for plot in (_by_part(metric, series[0]) if single else _by_series(metric, series))
    ]


@dataclass(frozen=True, slots=True)
class _Metric:
    """A metric of steps with its parts, such as sources; `read` gets them from a step."""

    name: str
    title: str
    y_label: str
    read: Callable[[Run, Metrics], Values]
    unit: str = NUMBER


def _named(key: str) -> Callable[[Run, Metrics], Values]:
    return lambda run, metrics: {"": metrics.get(key)}


def _flat_groups(run: Run, metrics: Metrics) -> Values:
    method = METHODS.get(run.recipe.method)
    compares = method is None or method.group_advantages
    return {"": metrics.get("flat_groups") if compares else None}


def _kl(run: Run, metrics: Metrics) -> Values:
    kl = metrics.get("kl", {})
    return {
        "held out, KL(reference || policy)": kl.get("held_out", {}).get("forward"),
        "own samples, KL(policy || reference)": kl.get("rollouts", {}).get("reverse"),
    }


def _engine_gap(run: Run, metrics: Metrics) -> Values:
    gap = metrics.get("engine_gap") or {}
    return {"mean": gap.get("mean"), "95th percentile": gap.get("p95")}


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
    _Metric("flat-groups", "Flat groups (all rewards equal)", "share", _flat_groups, SHARE),
    _Metric("kl", "KL to the reference", "nats per token", _kl),
    _Metric("engine-gap", "Log-probs of trainer and engine", "nats per token", _engine_gap),
    _Metric("entropy", "Entropy", "nats per token", _named("entropy")),
    _Metric("gradient-norm", "Gradient norm", "before clipping", _named("grad_norm")),
    _Metric("loss", "Loss", "", _named("loss")),
    _Metric("truncated", "Responses cut by the length limit", "share", _named("truncated"), SHARE),
    _Metric("speed", "Speed", "tokens per second", _speed),
    _Metric("memory", "Peak memory", "GiB", _memory),
)


# Titles and units of metrics that the package's losses report; others appear by their names.
_OBJECTIVE = {
    "rectified": ("Rectified tokens (p < tau)", "share", SHARE),
    "clip_fraction": ("Clipped tokens", "share", SHARE),
    "ratio": ("Importance ratio of tokens", "mean", NUMBER),
    "reference_kl": ("KL in the loss", "nats per token", NUMBER),
}


def unit_of(name: str) -> str:
    """The unit of a metric that a loss reports."""
    return _OBJECTIVE[name][2] if name in _OBJECTIVE else NUMBER


def unit_of_figure(name: str) -> str:
    """The unit of a figure of an evaluated set."""
    return SHARE if figure_of(name).unit == SHARE else NUMBER


def _objective_metric(name: str) -> _Metric:
    title, y_label, unit = _OBJECTIVE.get(name, (name, "mean over tokens", NUMBER))

    def read(run: Run, metrics: Metrics) -> Values:
        return {"": objective_metrics(metrics).get(name)}

    return _Metric(slug(name) or "objective", title, y_label, read, unit)


def _by_part(metric: _Metric, series: Series) -> Iterable[Plot]:
    """One plot, a curve for each part."""
    parts = _parts(metric, [series])
    curves = tuple(
        _over_steps(metric, part, series, color, part) for color, part in enumerate(parts)
    )
    if curves:
        yield Plot(metric.name, metric.title, "step", metric.y_label, curves, metric.unit)


def _by_series(metric: _Metric, series: Sequence[Series]) -> Iterable[Plot]:
    """A plot for each part, a curve for each series; the sources of the reward share a plot."""
    parts = _parts(metric, series)
    if metric.name == "reward" and len(parts) > 1:
        named = ", ".join(f"{part} {style}" for part, style in zip(parts, _STYLES, strict=False))
        curves = tuple(
            replace(_over_steps(metric, part, one, color, f"{one.label}, {part}"), dash=dash)
            for dash, part in enumerate(parts)
            for color, one in enumerate(series)
        )
        title = f"{metric.title} ({named})"
        yield Plot(metric.name, title, "step", metric.y_label, curves, metric.unit, by_series=True)
        return
    for part in parts:
        curves = tuple(
            _over_steps(metric, part, one, color, one.label) for color, one in enumerate(series)
        )
        name = f"{metric.name}-{slug(part)}" if part else metric.name
        title = f"{metric.title}: {part}" if part else metric.title
        yield Plot(name, title, "step", metric.y_label, curves, metric.unit, by_series=True)


def _parts(metric: _Metric, series: Iterable[Series]) -> list[str]:
    """The parts that have a value in any step of any run."""
    steps = ((run, m) for one in series for run in one.runs for m in run.metrics)
    found = (part for run, m in steps for part, v in metric.read(run, m).items() if v is not None)
    return list(dict.fromkeys(found))


def _over_steps(metric: _Metric, part: str, series: Series, color: int, label: str) -> Curve:
    """A curve of the mean over the runs of a series, with the range from lowest to highest."""
    by_step: dict[int, list[float]] = {}
    for run in series.runs:
        for m in run.metrics:
            values = by_step.setdefault(m["step"], [])
            value = metric.read(run, m).get(part)
            values += [] if value is None else [value]
    steps = sorted(by_step)
    if metric.name == "kl":  # Not measured in every step: a line connects the measurements.
        steps = [step for step in steps if by_step[step]]
    y = [fmean(by_step[step]) if by_step[step] else None for step in steps]
    if len(series.runs) == 1:
        return Curve(label, color, steps, y)
    low = [min(by_step[step], default=None) for step in steps]
    high = [max(by_step[step], default=None) for step in steps]
    return Curve(label, color, steps, y, low, high)


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).lower().split())


# --- pass@k ----------------------------------------------------------------------------------


def pass_at_k_plots(series: Sequence[Series]) -> list[Plot]:
    """pass@k over k for each evaluated set, trained policies and the base of the first series.

    Sets of which only a mean reward is known have no plot.
    """
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


def _pass_at_k(series: Series, name: str, which: str, color: int) -> Curve | None:
    sets = [run.evals.get(which, {}).get(name, {}) for run in series.runs]
    found = [figures for figures in sets if "correct" in figures]
    if not found:
        return None
    samples = min(sample_count(figures) for figures in found)
    ks = [2**i for i in range(samples.bit_length())]
    y = [fmean(mean_pass_at_k(counts(figures), k) for figures in found) for k in ks]
    label = "base" if which == "base" else series.label
    return Curve(label, color, ks, y)


def sample_count(figures: Metrics) -> int:
    """The number of samples per problem of an evaluated set."""
    return round(figures["samples"] / figures["problems"])


def counts(figures: Metrics) -> list[tuple[int, int]]:
    """(samples, correct samples) of each problem of an evaluated set."""
    samples = sample_count(figures)
    return [(samples, correct) for correct in figures["correct"].values()]


# --- evaluations while training --------------------------------------------------------------


def evaluation_plots(series: Sequence[Series]) -> list[Plot]:
    """The main figure of each set over the steps of its evaluations; step 0 is the base.

    The range is the 95% interval over problems, or from lowest to highest of several runs.
    """
    found = [e for one in series for run in one.runs for e in run.while_training.values()]
    plots = []
    for name in dict.fromkeys(name for evaluation in found for name in evaluation):
        figure = next(main_figure(evaluation[name]) for evaluation in found if name in evaluation)
        curves = [_evaluations(one, name, figure, color) for color, one in enumerate(series)]
        title, label = f"Evaluation while training on {name}", label_of(figure)
        plots.append(
            Plot(f"evaluation-{slug(name)}", title, "step", label, tuple(filter(None, curves)),
                 unit_of_figure(figure), by_series=len(series) > 1)
        )  # fmt: skip
    return plots


def _evaluations(series: Series, name: str, figure: str, color: int) -> Curve | None:
    """The curve of a series; the mean over its runs."""
    by_step: dict[int, list[Metrics]] = {}
    for run in series.runs:
        for step, sets in run.while_training.items():
            if figure in sets.get(name, {}):
                by_step.setdefault(step, []).append(sets[name])
    if not by_step:
        return None
    steps = sorted(by_step)
    values = [[figures[figure] for figures in by_step[step]] for step in steps]
    if len(series.runs) > 1:
        low, high = [min(each) for each in values], [max(each) for each in values]
    else:
        intervals = [by_step[step][0][f"{figure}_interval"] for step in steps]
        low, high = [low for low, _ in intervals], [high for _, high in intervals]
    return Curve(series.label, color, steps, [fmean(each) for each in values], low, high)


# --- sweeps ----------------------------------------------------------------------------------


def sweep_plot(sweep: Sweep) -> Plot | None:
    """The headline figure over the one numeric field of a sweep, with the rectified share.

    None for a sweep of several fields, of one without numbers, or of fewer than two points.
    """
    figure = main_figure(_figures(sweep))
    points = [point for point in sweep.points if figure in point.figures]
    if len(points) < 2 or len(sweep.fields) != 1:
        return None
    [field] = sweep.fields
    if not all(type(point.settings[field]) in (int, float) for point in points):
        return None
    points.sort(key=lambda point: point.settings[field])
    x = [point.settings[field] for point in points]
    mean, low, high = ([p.figures[figure][part] for p in points] for part in _PARTS)
    shares = [point.figures.get("rectified", {}).get("mean") for point in points]
    return Plot(
        name=f"sweep-{slug(sweep.label)}",
        title=f"{figure_of(figure).quantity.capitalize()} by {field.rpartition('.')[2]}",
        x_label=field,
        y_label=label_of(figure),
        curves=(Curve(label_of(figure), 0, x, mean, low, high),),
        unit=unit_of_figure(figure),
        points=True,
        log_x=x[0] > 0 and x[-1] / x[0] >= 50,
        second=Curve("rectified tokens", 1, x, shares) if any(shares) else None,
    )


def sweep_units(sweep: Sweep) -> dict[str, str]:
    """The unit of each figure of a sweep's points."""
    figures = _figures(sweep)
    reported = set(objective_names(sweep.runs)) | {"rectified"}
    of_set = unit_of_figure(main_figure(figures))  # All sets have the same figures.
    return {
        name: NUMBER if name == "kl" else unit_of(name) if name in reported else of_set
        for name in figures
    }


def _figures(sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(name for point in sweep.points for name in point.figures))


_PARTS = ("mean", "low", "high")
