"""`gft-lite groups`: a recipe's groups, sampled and scored once before training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from gft_lite.recipe.method_parameters import complete_objective
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import find_folder
from gft_lite.runs.metrics import PhaseTimer, count_self_tokens
from gft_lite.training.presampled_groups import PresampledGroups, check_sampling_recipe
from gft_lite.training.setup import Place, TrainingRun, setup_run
from gft_lite.training.visits import ProblemVisit, presampled_visits
from gft_lite.utils.distributed import SINGLE_PROCESS
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.files import check_output_path
from gft_lite.utils.progress import stderr_console


def presample(
    recipe: Recipe, out: str | Path | None = None, *, visits: int = 1,
    console: Console | None = None,
) -> PresampledGroups:  # fmt: skip
    """Sample and score the groups that a recipe's steps visit, with the policy at its start.

    A problem gets at most `visits` groups; groups that `out` already has are not sampled again.

    Raises: RecipeError for a wrong recipe or folder.
    """
    if recipe.stages:
        raise RecipeError(["stages: must be empty for groups that are sampled before training."])
    if visits < 1:
        raise UserError([f"--visits: must be at least 1, got {visits}."])
    folder = Path(out or recipe.group.offline or Path("groups") / recipe.name)
    check_output_path(folder)
    recipe = complete_objective(_sampling_recipe(recipe))
    resume = (folder / "recipe.yaml").exists() and not (folder / "metrics.jsonl").exists()
    saved = check_sampling_recipe(folder, recipe, "--out", compare_seed=True) if resume else recipe
    console = console or stderr_console()
    run_folder = find_folder(saved, folder, resume=resume, distributed=SINGLE_PROCESS)
    with ExitStack() as stack:
        run = setup_run(saved, Place(run_folder, SINGLE_PROCESS, console, stack))
        run.evaluate_base()
        if saved.policy.adapter:
            run.engine.sync(0)
        store = PresampledGroups(folder)
        _fill(store, run, list(presampled_visits(recipe, run.builder.problems, visits)))
    shutil.rmtree(run_folder.scratch, ignore_errors=True)
    return store


def _sampling_recipe(recipe: Recipe) -> Recipe:
    group = recipe.group.model_copy(update={"offline": None})
    log = recipe.log.model_copy(update={"trackers": []})
    return recipe.model_copy(update={"group": group, "log": log})


def _fill(store: PresampledGroups, run: TrainingRun, visits: Sequence[ProblemVisit]) -> None:
    """Sample and grade the visits that the store lacks."""
    timer, started, tokens = PhaseTimer(), time.perf_counter(), 0
    for chunk in _chunks(run.recipe, [visit for visit in visits if visit not in store]):
        with timer("rollout"):
            groups = run.builder.sample(chunk)
        with timer("reward"):
            graded = run.builder.grade(groups)
        store.add(chunk, graded)
        tokens += count_self_tokens(graded)
        run.print(
            f"groups: {sum(visit in store for visit in visits):,} of {len(visits):,}, {tokens:,} "
            f"tokens sampled, {tokens / timer.seconds['rollout']:,.0f} tokens/s"
        )
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in timer.seconds.items())
    run.print(f"seconds: {phases or 'none'}, all {time.perf_counter() - started:.1f}")


def _chunks(recipe: Recipe, visits: Sequence[ProblemVisit]) -> Iterator[Sequence[ProblemVisit]]:
    """Chunks that keep the engine busy and lose little when interrupted."""
    size = max(1, 4 * recipe.rollout.rows // recipe.group.size)
    for start in range(0, len(visits), size):
        yield visits[start : start + size]
