"""Results of a sweep: the files results.json and results.csv, and the table of settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gft_lite.experiments.sweep_config import Sweep, Trial, as_text
from gft_lite.recipe.effects import Affects, differences, values_affecting
from gft_lite.recipe.schema import Recipe
from gft_lite.report.loading import objective_metrics, read_sweep_results
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import UserError
from gft_lite.utils.files import write_text_atomic
from gft_lite.utils.statistics import t_interval
from gft_lite.utils.tables import Table, csv_text, flatten, import_pandas


class SweepFolder:
    """The files of a sweep, which are read without loading a model."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def run(self, name: str) -> RunFolder:
        """The run of a trial."""
        return RunFolder(self.path / "trials" / name)

    def results(self) -> dict[str, Any]:
        """`trials`, one each, and `settings`, the figures of each over its seeds.

        Raises: UserError for a damaged file.
        """
        return read_sweep_results(self.path)

    def frame(self) -> Any:
        """A pandas DataFrame with a row for each trial."""
        return import_pandas().read_csv(self.path / "results.csv")


def other_recipe(run: RunFolder, recipe: Recipe) -> Path | None:
    """The recipe file in a run's folder if it gives other results than `recipe`, else None."""
    file = run.path / "recipe.yaml"
    if not file.exists():
        return None
    old, new = (values_affecting(r, Affects.RUN) for r in (Recipe.load(file), recipe))
    return file if any(differences(old, new)) else None


def write_results(
    folder: SweepFolder, plan: Sweep, trials: Sequence[Mapping[str, Any]],
    search: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write results.json and results.csv atomically; `search` is the summary of a search."""
    results = {
        "name": plan.name,
        "grid": plan.model_dump(mode="json")["grid"],
        "interval": "95%, Student's t over seeds",
        "settings": settings_figures(trials),
        "trials": trials,
        **({"search": search} if search else {}),
    }
    write_text_atomic(folder.path / "results.json", json.dumps(results, indent=1))
    write_text_atomic(folder.path / "results.csv", csv_text([_csv_row(t) for t in trials]))


def trial_result(trial: Trial, run: RunFolder, state: str, reason: str | None) -> dict[str, Any]:
    """The entry of a trial in results.json; a finished run with damaged files is "failed"."""
    summary, means = None, {}
    try:
        means = _objective_means(run)
        summary = run.summary() if state == "done" else None
    except UserError as error:
        if state == "done":
            state, reason = "failed", str(error)
    return {
        "name": trial.name,
        "settings": trial.settings,
        "seed": trial.recipe.seed,
        "state": state,
        "reason": reason,
        "folder": f"trials/{trial.name}",
        "rectified": means.get("rectified"),
        "objective": means,
        "summary": summary,
    }


def _objective_means(run: RunFolder) -> dict[str, float | None]:
    """The mean over the steps of each metric that the loss reported."""
    steps = [objective_metrics(metrics) for metrics in run.metrics()]
    means: dict[str, float | None] = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        values = [value for step in steps if (value := step.get(name)) is not None]
        means[name] = fmean(values) if values else None
    return means


def _csv_row(trial: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: trial[key] for key in ("name", "state", "reason", "seed", "rectified")}
    settings = {field: as_text(value) for field, value in trial["settings"].items()}
    others = {f"objective/{k}": v for k, v in trial["objective"].items() if k != "rectified"}
    figures = {k: v for k, v in flatten(trial["summary"] or {}).items() if k not in own}
    return {**own, **settings, **others, **figures}


def settings_figures(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean and interval of each figure over the finished seeds, by settings."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(trial["settings"]), []).append(trial)
    rows = []
    for same in groups.values():
        done = [trial for trial in same if trial["state"] == "done"]
        values = [
            {**t["summary"]["trained"], "rectified": t["rectified"], **t.get("objective", {})}
            for t in done
        ]
        names = dict.fromkeys(name for each in values for name in each)
        rows.append({
            "settings": same[0]["settings"],
            "done": len(done),
            "failed": sum(trial["state"] == "failed" for trial in same),
            "figures": {
                name: _spread([v for each in values if (v := each.get(name)) is not None])
                for name in names
            },
        })  # fmt: skip
    return rows


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    low, high = t_interval(values) if len(values) > 1 else (None, None)
    return {"mean": fmean(values) if values else None, "low": low, "high": high}


def results_by_settings(results: Mapping[str, Any]) -> Table:
    """A row per settings, a column per figure: means over seeds and half widths of intervals."""
    rows = results["settings"]
    fields = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    figures = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    cells = [
        (*(as_text(row["settings"][f]) for f in fields), str(row["done"]), str(row["failed"]),
         *(_cell(row["figures"].get(name)) for name in figures))
        for row in rows
    ]  # fmt: skip
    title = f"{results['name']}: means over seeds (interval: {results['interval']})"
    return Table(title, (*fields, "done", "failed", *figures), tuple(cells), labels=len(fields))


def _cell(figure: Mapping[str, float | None] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "-"
    spread = "" if figure["high"] is None else f" ±{figure['high'] - figure['mean']:.3f}"
    return f"{figure['mean']:.3f}{spread}"
