"""`gft-lite lab compare`: methods on the lab task, with the same data, base and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.console import Console

from gft_lite.experiments.sweep_config import MAX_RUNS
from gft_lite.experiments.sweep_results import other_recipe
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import UserError
from gft_lite.utils.files import check_output_path
from gft_lite.utils.progress import stderr_console
from gft_lite.utils.tables import results_table


def compare(methods: Sequence[str], seeds: int, out: str, overrides: Sequence[str]) -> None:
    """Train the unfinished runs in the folder `out` and print each method's mean over the seeds.

    Raises: UserError for wrong options and recipes, before the first run starts.
    """
    recipes = _load_recipes(methods, seeds, overrides)
    check_output_path(out)
    _check_folders(recipes, Path(out))
    console, progress = Console(), stderr_console()
    columns: dict[str, dict[str, float]] = {}
    finished: list[RunFolder] = []
    for method, by_seed in recipes.items():
        runs = [_train(recipe, _folder(out, method, recipe), progress) for recipe in by_seed]
        finished += runs
        summaries = [run.summary() for run in runs]
        columns.setdefault("base", _mean([s["base"] for s in summaries]))
        columns[f"trained: {method}"] = {
            **_mean([s["trained"] for s in summaries]),
            **{f"{s} trajectories": n for s, n in summaries[0]["sources"].items()},
            "seconds": mean(s["seconds"]["total"] for s in summaries),
        }
    console.print(results_table(columns, f"the lab task, mean of {seeds} seed(s)"))
    for run in finished:
        console.print(f"run: {run.path}", markup=False, soft_wrap=True)


def _load_recipes(
    methods: Sequence[str], seeds: int, overrides: Sequence[str]
) -> dict[str, list[Recipe]]:
    """A recipe for each method and seed."""
    if not 1 <= seeds <= MAX_RUNS:
        raise UserError([f"--seeds: must be from 1 to {MAX_RUNS:,}, got {seeds}."])
    recipes, problems = {}, []
    for method in methods:
        file = "recipes/lab.yaml" if method == "gft" else f"recipes/lab_{method}.yaml"
        try:
            recipe = Recipe.load(file, [*overrides, "seed=0"])
        except UserError as error:
            problems += [f"--methods: {method}: {problem}" for problem in error.problems]
            continue
        recipes[method] = [recipe.model_copy(update={"seed": seed}) for seed in range(seeds)]
    if problems:
        raise UserError(problems)
    return recipes


def _check_folders(recipes: dict[str, list[Recipe]], out: Path) -> None:
    """Raises: UserError if a run's folder has another recipe."""
    problems = []
    for method, by_seed in recipes.items():
        for recipe in by_seed:
            if saved := other_recipe(_folder(out, method, recipe), recipe):
                rule = "--out: must be a new folder or one of the same recipes"
                problems.append(f"{rule}, got another in {saved}. Choose another folder.")
    if problems:
        raise UserError(problems)


def _folder(out: str | Path, method: str, recipe: Recipe) -> RunFolder:
    return RunFolder(Path(out) / f"{method}-{recipe.seed}")


def _train(recipe: Recipe, run: RunFolder, console: Console) -> RunFolder:
    if (run.path / "summary.json").exists():
        return run
    from gft_lite.training.run import train  # Needs torch, which checks of options do without.

    console.print(f"[bold]{run.path.name}[/bold]")
    resume = (run.path / "recipe.yaml").exists()
    return train(recipe, run.path, resume=resume, console=console)


def _mean(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: mean(f[name] for f in figures) for name in figures[0]}
