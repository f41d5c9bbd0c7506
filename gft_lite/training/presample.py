"""`gft-lite groups`: a recipe's groups, sampled once before training and scored."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from gft_lite.recipe.schema import Recipe
from gft_lite.rollout.sampling import requests, respond
from gft_lite.runs.base_cache import BASE_EVALUATION
from gft_lite.runs.metrics import PhaseTimer, count_self_tokens
from gft_lite.training import groups as grouping
from gft_lite.training.offline_groups import OfflineGroups, Turn, all_turns, refuse_other_recipe
from gft_lite.training.session import Session, open_session
from gft_lite.types import Group
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import cached_json


def presample(
    recipe: Recipe, out: str | Path | None = None, *, visits: int = 1,
    console: Console | None = None,
) -> OfflineGroups:  # fmt: skip
    """Sample and score the groups that a recipe's steps visit, with the policy as it starts.

    A problem has at most `visits` groups; what `out` has already is not sampled again.
    Raises: RecipeError for a wrong recipe or folder.
    """
    if recipe.stages:
        raise RecipeError(["stages: must be empty for groups that are sampled before training."])
    if visits < 1:
        raise RecipeError([f"--visits: must be at least 1, got {visits}."])
    folder = Path(out or recipe.group.offline or Path("groups") / recipe.name)
    group = recipe.group.model_copy(update={"offline": None})
    log = recipe.log.model_copy(update={"trackers": []})
    recipe = recipe.model_copy(update={"group": group, "log": log})
    begun = (folder / "recipe.yaml").exists() and not (folder / "metrics.jsonl").exists()
    first = refuse_other_recipe(folder, recipe, "--out", seed=True) if begun else recipe
    console = console or Console(stderr=True)
    with ExitStack() as stack:
        session = open_session(first, folder, resume=begun, console=console, stack=stack)
        cached_json(folder / BASE_EVALUATION, session.evaluate)
        if first.policy.adapter:
            session.sync(0)
        store = OfflineGroups(folder)
        _fill(store, session, list(all_turns(recipe, session.problems, visits)))
    shutil.rmtree(session.run.scratch, ignore_errors=True)
    return store


def _fill(store: OfflineGroups, session: Session, turns: Sequence[Turn]) -> None:
    """Sample and score what is missing."""
    clock, started, tokens = PhaseTimer(), time.perf_counter(), 0
    for chunk in _chunks(session, [turn for turn in turns if turn not in store]):
        with clock("rollout"):
            groups = _sample(session, chunk)
        with clock("reward"):
            scored = session.scorer.score(groups)
        store.add(chunk, scored)
        tokens += count_self_tokens(scored)
        session.say(
            f"groups: {sum(turn in store for turn in turns):,} of {len(turns):,}, {tokens:,} "
            f"tokens sampled, {tokens / clock.seconds['rollout']:,.0f} tokens/s"
        )
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in clock.seconds.items())
    session.say(f"seconds: {phases or 'none'}, all {time.perf_counter() - started:.1f}")


def _chunks(session: Session, turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """Large enough to keep the engine busy, small enough to lose little when interrupted."""
    recipe = session.recipe
    size = max(1, 4 * recipe.rollout.rows // recipe.group.size)
    for start in range(0, len(turns), size):
        yield turns[start : start + size]


def _sample(session: Session, chunk: Sequence[Turn]) -> list[Group]:
    """The unscored groups of a chunk: in the first visit those of training before it updates."""
    recipe, sampling = session.recipe, session.sampling
    composed = [(t, c) for t in chunk if (c := grouping.compose(t.problem, recipe.group, t.visit))]
    asked = [
        request
        for t, c in composed
        for request in requests([t.problem], [c.self_samples], (recipe.seed, t.step, t.visit))
    ]
    selves = respond(session.engine, session.format, asked, sampling)
    return [
        Group(
            t.problem,
            grouping.demonstrations(c, session.format, sampling.max_tokens) + own,
        )
        for (t, c), own in zip(composed, selves, strict=True)
    ]
