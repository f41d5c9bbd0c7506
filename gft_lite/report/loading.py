"""Run and sweep folders as a report sees them, read from their files alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Run:
    """One run; `summary` is None until it is finished.

    `evals` maps "base" and "trained", where there, to the figures of each set.
    """

    label: str
    folder: RunFolder
    recipe: Recipe
    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    evals: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep, done, failed, interrupted or waiting; `run` is None if not begun."""

    name: str
    seed: int
    state: str
    reason: str | None
    run: Run | None


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a sweep's grid with its trials.

    `figures` are the trained policies': `mean`, `low` and `high` over the `done` seeds.
    """

    settings: Mapping[str, Any]
    done: int
    figures: Mapping[str, Mapping[str, float | None]]
    trials: tuple[Trial, ...]

    @property
    def label(self) -> str:
        """The point in words: `tau = 0.7`."""
        words = (f"{name.rpartition('.')[2]} = {value}" for name, value in self.settings.items())
        return ", ".join(words) or "the recipe"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Trials over a grid of recipe fields; `base` are the base's figures, `interval` is what
    the points' low and high are."""

    label: str
    interval: str
    fields: tuple[str, ...]
    base: Mapping[str, float]
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """Runs that differ in nothing but the seed: one colour and one line of every plot."""

    label: str
    runs: tuple[Run, ...]


def read_folders(paths: Iterable[str | Path]) -> tuple[list[Run], list[Sweep]]:
    """The runs, stages of staged runs one by one, and the sweeps that the folders hold.

    Raises: RecipeError with every folder that is neither.
    """
    runs: list[Run] = []
    sweeps: list[Sweep] = []
    wrong: list[str] = []
    unique = {path.resolve(): path for path in map(Path, paths)}
    for path, label in zip(unique, _labels(list(unique)), strict=True):
        try:
            if (path / "results.json").is_file() and (path / "sweep.yaml").is_file():
                sweeps.append(_sweep(path, label))
            elif (path / "recipe.yaml").is_file():
                runs += _runs(path, label)
            else:
                given = str(unique[path])
                wrong.append(f"RUN: must be the folder of a run or of a sweep, got {given!r}.")
        except RecipeError as error:
            wrong += error.problems
    if wrong:
        raise RecipeError(wrong)
    return runs, sweeps


def all_series(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> list[Series]:
    """Each run by itself, and each point of each sweep with its seeds."""
    found = [Series(run.label, (run,)) for run in runs]
    for sweep in sweeps:
        before = f"{sweep.label}: " if len(sweeps) > 1 else ""
        for point in sweep.points:
            begun = tuple(trial.run for trial in point.trials if trial.run and trial.run.metrics)
            found += [Series(before + point.label, begun)] if begun else []
    return found


def objective_metrics(step: Mapping[str, Any]) -> Mapping[str, float | None]:
    """The means that the loss reported in a step, by name; runs of older versions have one."""
    return step.get("objective") or {"rectified": step.get("rectified")}


def _labels(paths: Sequence[Path]) -> list[str]:
    """The folders' names, as much of the path before them as tells them apart."""
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def _runs(path: Path, label: str) -> list[Run]:
    stages = sorted(folder.parent for folder in path.glob("stages/*/recipe.yaml"))
    return [_run(stage, f"{label}/{stage.name}") for stage in stages] or [_run(path, label)]


def _run(path: Path, label: str) -> Run:
    folder = RunFolder(path)
    finished = (path / "summary.json").is_file()
    files = {name: path / "eval" / f"{name}.json" for name in ("base", "trained")}
    return Run(
        label=label,
        folder=folder,
        recipe=Recipe.load(path / "recipe.yaml"),
        metrics=_steps(folder.metrics()),
        summary=folder.summary() if finished else None,
        evals={
            n: json.loads(file.read_text(encoding="utf-8"))
            for n, file in files.items()
            if file.is_file()
        },
    )


def _steps(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics with their steps counted on from stage to stage, which start from 1 each."""
    staged = any("stage" in m for m in metrics)
    return [{**m, "step": i} for i, m in enumerate(metrics, 1)] if staged else list(metrics)


def _sweep(path: Path, label: str) -> Sweep:
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    summaries = (trial["summary"] for trial in results["trials"] if trial["summary"])
    points = []
    for row in results["settings"]:
        same = (trial for trial in results["trials"] if trial["settings"] == row["settings"])
        trials = tuple(_trial(path, label, trial) for trial in same)
        points.append(Point(row["settings"], row["done"], row["figures"], trials))
    fields = tuple(results["trials"][0]["settings"])
    base: dict[str, float] = next((summary["base"] for summary in summaries), {})
    return Sweep(label, results["interval"], fields, base, tuple(points))


def _trial(path: Path, label: str, found: Mapping[str, Any]) -> Trial:
    folder = path / found["folder"]
    begun = (folder / "recipe.yaml").is_file()
    run = _run(folder, f"{label}/{found['name']}") if begun else None
    return Trial(found["name"], found["seed"], found["state"], found["reason"], run)
