"""Methods side by side on the laboratory: the same data, base and evaluation for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.console import Console

from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.training.run import train
from gft_lite.utils.tables import results_table


def compare(methods: Sequence[str], seeds: int, out: str, overrides: Sequence[str]) -> None:
    """Train what is not trained yet under `out`, and print every method's mean over the seeds."""
    console = Console()
    columns: dict[str, dict[str, float]] = {}
    finished: list[RunFolder] = []
    for method in methods:
        runs = [_run(method, seed, Path(out), overrides, console) for seed in range(seeds)]
        finished += runs
        summaries = [run.summary() for run in runs]
        columns.setdefault("base", _mean([s["base"] for s in summaries]))
        columns[f"trained: {method}"] = {
            **_mean([s["trained"] for s in summaries]),
            **{f"{s} trajectories": n for s, n in summaries[0]["sources"].items()},
            "seconds": mean(s["seconds"]["total"] for s in summaries),
        }
    console.print(results_table(columns, f"the laboratory, mean of {seeds} seed(s)"))
    for run in finished:
        console.print(f"run: {run.path}", markup=False, soft_wrap=True)


def _run(
    method: str, seed: int, out: Path, overrides: Sequence[str], console: Console
) -> RunFolder:
    recipe = Recipe.load(_recipe_of(method), [*overrides, f"seed={seed}"])
    run = RunFolder(out / f"{method}-{seed}")
    if (run.path / "summary.json").exists():
        return run
    console.print(f"[bold]{method}, seed {seed}[/bold]")
    resume = (run.path / "recipe.yaml").exists()
    return train(recipe, run.path, resume=resume, console=console)


def _recipe_of(method: str) -> str:
    return "recipes/lab.yaml" if method == "gft" else f"recipes/lab_{method}.yaml"


def _mean(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: mean(f[name] for f in figures) for name in figures[0]}
