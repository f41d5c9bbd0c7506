"""The headline figures of runs: time, tokens, the best step, and which values are the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gft_lite.recipe.figures import label_of, lower_is_better, main_figure
from gft_lite.report.curves import unit_of_figure
from gft_lite.report.loading import Run, Sweep, objective_names
from gft_lite.report.summary import Score, seconds_of


@dataclass(frozen=True, slots=True)
class BestStep:
    """The evaluated step with the best figure of the first set; 0 is the base."""

    step: int
    name: str
    value: float
    unit: str


def best_step_of(run: Run) -> BestStep | None:
    """The first of the best steps; None without evaluations while training."""
    evaluations = run.while_training
    name = next((name for sets in evaluations.values() for name in sets), None)
    if name is None:
        return None
    figure = next(main_figure(sets[name]) for sets in evaluations.values() if name in sets)
    found = {step: sets[name][figure] for step, sets in evaluations.items()
             if figure in sets.get(name, {})}  # fmt: skip
    step = (min if lower_is_better(figure) else max)(sorted(found), key=lambda step: found[step])
    label = f"{name}, {label_of(figure)}"
    return BestStep(step, label, found[step], unit_of_figure(figure))


def total_seconds(run: Run) -> float:
    """Seconds of all phases."""
    return sum(seconds_of(run).values())


def tokens_of(run: Run) -> dict[str, int]:
    """The tokens that were trained on and those that were sampled."""
    return {
        name: sum(m[key] for m in run.metrics)
        for name, key in (("trained", "trained_tokens"), ("sampled", "rollout_tokens"))
    }


def best_scores(scores: Iterable[Mapping[str, Score]]) -> dict[str, float]:
    """The best value of the trained policies for each score that two or more of them have."""
    values: dict[str, list[float]] = {}
    best: dict[str, Callable[[Iterable[float]], float]] = {}
    for of_run in scores:
        for name, score in of_run.items():
            values.setdefault(name, []).extend([score.trained.value] if score.trained else [])
            best[name] = min if score.lower_is_better else max
    return {name: best[name](found) for name, found in values.items() if len(found) > 1}


def best_of_sweep(sweep: Sweep) -> dict[str, float]:
    """The best mean of each evaluated set's figure over the points of a sweep."""
    sets = [pair for run in sweep.runs for of in run.evals.values() for pair in of.items()]
    falling = {name for name, figures in sets if lower_is_better(main_figure(figures))}
    reported = {*objective_names(sweep.runs), "rectified", "kl"}
    means: dict[str, list[float]] = {}
    for point in sweep.points:
        for name, figure in point.figures.items():
            mean = figure.get("mean")
            if name not in reported and mean is not None:
                means.setdefault(name, []).append(mean)
    return {name: (min if name in falling or lower_is_better(name) else max)(found)
            for name, found in means.items() if len(found) > 1}  # fmt: skip


def changed_settings(run: Run) -> dict[str, dict[str, str]]:
    """The recipe's values that are not the defaults, by section; fields of none are under ""."""
    sections: dict[str, dict[str, str]] = {}
    for name, value in run.recipe.model_dump(mode="json", exclude_defaults=True).items():
        if isinstance(value, Mapping):
            sections[name] = dict(_leaves(value))
        else:
            sections.setdefault("", {}).update(_leaves({name: value}))
    found = {name: fields for name, fields in sections.items() if fields}
    return dict(sorted(found.items(), key=lambda item: item[0] != ""))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values by dotted names; those of a list of sections have numbers in their names."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value, 1)}
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value))
        else:
            yield name, str(value)
