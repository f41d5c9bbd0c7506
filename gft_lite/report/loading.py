"""Run and sweep folders, read from their files without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gft_lite.evaluation.metrics import by_problem
from gft_lite.recipe.figures import compared
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import UserError
from gft_lite.utils.files import read_json
from gft_lite.utils.paired_difference import paired_difference

Metrics = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One run; `summary` is None until it is finished.

    `evals` maps "base" and "trained", if evaluated, to the figures of each set. `while_training`
    maps the steps of evaluations while training to them, 0 for the base.
    """

    label: str
    folder: RunFolder
    recipe: Recipe
    metrics: Sequence[Metrics]
    summary: Metrics | None
    evals: Mapping[str, Mapping[str, Metrics]]
    while_training: Mapping[int, Mapping[str, Metrics]]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep, done, failed, interrupted or waiting; `run` is None if not started."""

    name: str
    seed: int
    state: str
    reason: str | None
    run: Run | None


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a sweep's grid with its trials.

    `figures` have `mean`, `low` and `high` of the trained policies of the `done` seeds.
    """

    settings: Mapping[str, Any]
    done: int
    figures: Mapping[str, Mapping[str, float | None]]
    trials: tuple[Trial, ...]

    @property
    def label(self) -> str:
        """The settings as text: `tau = 0.7`."""
        words = (f"{name.rpartition('.')[2]} = {value}" for name, value in self.settings.items())
        return ", ".join(words) or "the recipe"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Trials over a grid of recipe fields; `base` has the figures of the base.

    `interval` describes the `low` and `high` of the points.
    """

    label: str
    interval: str
    fields: tuple[str, ...]
    base: Mapping[str, float]
    points: tuple[Point, ...]

    @property
    def runs(self) -> list[Run]:
        """The started runs."""
        return [trial.run for point in self.points for trial in point.trials if trial.run]


@dataclass(frozen=True, slots=True)
class Series:
    """Runs that differ only in the seed: one color and one line of every plot."""

    label: str
    runs: tuple[Run, ...]


def read_folders(paths: Iterable[str | Path]) -> tuple[list[Run], list[Sweep]]:
    """The runs and sweeps in some folders; the stages of a staged run are separate runs.

    Raises: UserError with every folder that is neither, or has a damaged file.
    """
    runs: list[Run] = []
    sweeps: list[Sweep] = []
    problems: list[str] = []
    unique = {path.resolve(): path for path in map(Path, paths)}
    for path, label in zip(unique, _labels(list(unique)), strict=True):
        try:
            if (path / "results.json").is_file() and (path / "sweep.yaml").is_file():
                sweeps.append(_sweep(path, label))
            elif (path / "recipe.yaml").is_file():
                runs += _runs(path, label)
            else:
                given = str(unique[path])
                problems.append(f"RUN: must be the folder of a run or of a sweep, got {given!r}.")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return runs, sweeps


def read_sweep_results(path: Path) -> dict[str, Any]:
    """The results.json of a sweep's folder. Raises: UserError if it is damaged."""
    return read_json(
        path / "results.json", _parse_results, "must have the results of a sweep",
        "Run the sweep again: finished trials are kept.",
    )  # fmt: skip


def _parse_results(value: Any) -> dict[str, Any]:
    """Raises: KeyError, TypeError or AttributeError for anything but results of a sweep."""
    for trial in value["trials"]:
        _ = [trial[key] for key in ("name", "seed", "state", "reason", "folder", "summary")]
        trial["settings"].items()
    for row in value["settings"]:
        row["settings"].items()
        for figure in row["figures"].values():
            _ = figure["mean"], figure["low"], figure["high"]
        _ = row["done"]
    _ = value["interval"], value["trials"][0]
    return value


def all_series(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> list[Series]:
    """A series for each run, and for each point of each sweep with its seeds."""
    found = [Series(run.label, (run,)) for run in runs]
    for sweep in sweeps:
        before = f"{sweep.label}: " if len(sweeps) > 1 else ""
        for point in sweep.points:
            started = tuple(trial.run for trial in point.trials if trial.run and trial.run.metrics)
            found += [Series(before + point.label, started)] if started else []
    return found


def objective_metrics(step: Metrics) -> Mapping[str, float | None]:
    """The means that the loss reported in a step, by name; runs of older versions have one."""
    return step.get("objective") or {"rectified": step.get("rectified")}


def objective_names(runs: Iterable[Run]) -> list[str]:
    """The metrics that the losses of some runs reported in any step."""
    found = (objective_metrics(step).items() for run in runs for step in run.metrics)
    return list(dict.fromkeys(n for items in found for n, value in items if value is not None))


def _labels(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parent folders as make them unique.

    Of trials such as `tau=0,seed=1`, without the settings that all of them share.
    """
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    settings = [label.split(",") for label in labels]
    if not all("=" in part for found in settings for part in found):
        return labels
    short = [
        ",".join(p for p in of if any(p not in other for other in settings)) for of in settings
    ]
    return short if all(short) else labels


def _runs(path: Path, label: str) -> list[Run]:
    stages = sorted(folder.parent for folder in path.glob("stages/*/recipe.yaml"))
    return [_run(stage, f"{label}/{stage.name}") for stage in stages] or [_run(path, label)]


def _run(path: Path, label: str) -> Run:
    folder = RunFolder(path)
    finished = (path / "summary.json").is_file()
    evals = {name: folder.evaluation(name) for name in ("base", "trained")}
    return Run(
        label=label,
        folder=folder,
        recipe=Recipe.load(path / "recipe.yaml"),
        metrics=_steps(folder.metrics()),
        summary=folder.summary() if finished else None,
        evals={name: sets for name, sets in evals.items() if sets},
        while_training=folder.step_evaluations(),
    )


def _steps(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics with steps that count on from stage to stage, where each stage starts at 1."""
    staged = any("stage" in m for m in metrics)
    return [{**m, "step": i} for i, m in enumerate(metrics, 1)] if staged else list(metrics)


def _sweep(path: Path, label: str) -> Sweep:
    results = read_sweep_results(path)
    summaries = (trial["summary"] for trial in results["trials"] if trial["summary"])
    points = []
    for row in results["settings"]:
        same = (trial for trial in results["trials"] if trial["settings"] == row["settings"])
        trials = tuple(_trial(path, label, trial) for trial in same)
        figures = {name: _over_problems(name, f, trials) for name, f in row["figures"].items()}
        points.append(Point(row["settings"], row["done"], figures, trials))
    fields = tuple(results["trials"][0]["settings"])
    base: dict[str, float] = next((summary["base"] for summary in summaries), {})
    return Sweep(label, results["interval"], fields, base, tuple(points))


def _over_problems(name: str, figure: Metrics, trials: Sequence[Trial]) -> Metrics:
    """A figure of evaluated sets with its interval over seeds and problems; others as they are."""
    runs = [trial.run for trial in trials if trial.state == "done" and trial.run]
    values = [_by_problem(name, run.evals.get("trained", {})) for run in runs]
    problems = set.intersection(*(set(each) for each in values)) if values else set()
    if not problems:
        return figure
    mean = paired_difference([[each[i] for i in sorted(problems)] for each in values])
    if not mean.known:
        return figure
    half = float(mean.half_width())
    return {"mean": figure["mean"], "low": figure["mean"] - half, "high": figure["mean"] + half}


def _by_problem(name: str, sets: Mapping[str, Metrics]) -> Mapping[str, float]:
    """A headline figure of a run by problem: of the set of that name, or of the first set."""
    if name in sets:
        return by_problem(sets[name])
    if compared([name]):
        return by_problem(next(iter(sets.values())), name) if sets else {}
    return {}


def _trial(path: Path, label: str, found: Mapping[str, Any]) -> Trial:
    folder = path / found["folder"]
    started = (folder / "recipe.yaml").is_file()
    run = _run(folder, f"{label}/{found['name']}") if started else None
    return Trial(found["name"], found["seed"], found["state"], found["reason"], run)
