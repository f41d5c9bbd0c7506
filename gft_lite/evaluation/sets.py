"""The evaluation sets of a recipe or a suite, sampled and graded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.metrics import measure
from gft_lite.recipe.sections import EvalSettings, RewardSettings
from gft_lite.rewards.base import RewardError, RewardFunction
from gft_lite.rewards.scorer import Scorer
from gft_lite.rollout.base import RolloutEngine, Sampling
from gft_lite.rollout.sampling import sample
from gft_lite.types import Group, Problem
from gft_lite.utils.errors import RecipeError

Grade = Callable[[Sequence[Group]], list[Group]]


def open_scorer(settings: RewardSettings, *, conversational: bool) -> Scorer:
    """The scorer that a recipe or a suite asks for.

    Raises: RecipeError for a reward function that can't be found or built.
    """
    functions = [RewardFunction(f.name, f.weight, f.parameters) for f in settings.functions]
    try:
        return Scorer(
            functions,
            workers=settings.workers,
            timeout=settings.timeout,
            conversational=conversational,
        )
    except RewardError as error:
        raise RecipeError([str(error)]) from error


def evaluate_sets(
    engine: RolloutEngine,
    format: PromptFormat,
    grade: Grade,
    sets: Mapping[str, Sequence[Problem]],
    settings: EvalSettings,
    max_tokens: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Sample and grade every set; the same seeds for every model, so that pairs compare."""
    sampling = Sampling(settings.temperature, settings.top_p, max_tokens=max_tokens)
    return {
        name: measure(_answer(engine, format, grade, name, problems, settings, sampling, seed),
                      settings.k)
        for name, problems in sets.items()
    }  # fmt: skip


def _answer(
    engine: RolloutEngine,
    format: PromptFormat,
    grade: Grade,
    name: str,
    problems: Sequence[Problem],
    settings: EvalSettings,
    sampling: Sampling,
    seed: int,
) -> list[Group]:
    counts = [settings.samples] * len(problems)
    responses = sample(engine, format, problems, counts, sampling, (seed, "eval", name))
    return grade([Group(p, r) for p, r in zip(problems, responses, strict=True)])
