"""The evaluation sets of a recipe or a suite, sampled and graded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.metrics import measure
from gft_lite.recipe.objective_sections import RewardSettings
from gft_lite.recipe.training_sections import EvalSettings
from gft_lite.rewards.base import RewardError, RewardFunction
from gft_lite.rewards.scorer import Scorer
from gft_lite.rollout.base import RolloutEngine, Sampling
from gft_lite.rollout.sampling import Draw, sample
from gft_lite.types import Group, Problem
from gft_lite.utils.errors import RecipeError

Grade = Callable[[Sequence[Group]], list[Group]]


def open_scorer(
    settings: RewardSettings, *, conversational: bool, log: Callable[[str], None] | None = None
) -> Scorer:
    """The scorer that a recipe or a suite asks for; `log` gets a line about failures.

    Raises: RecipeError for a reward function that can't be found or built.
    """
    functions = [
        RewardFunction(f.name, f.weight, f.parameters, f.correct_above) for f in settings.functions
    ]
    try:
        return Scorer(
            functions,
            workers=settings.workers,
            timeout=settings.timeout,
            concurrency=settings.concurrency,
            conversational=conversational,
            log=log,
        )
    except RewardError as error:
        raise RecipeError([str(error)]) from error


@dataclass(frozen=True)
class SetEvaluator:
    """Samples and grades named sets of problems, with equal seeds for every model: results pair."""

    format: PromptFormat
    grade: Grade
    settings: EvalSettings
    sampling: Sampling
    seed: int

    def evaluate(
        self, engine: RolloutEngine, sets: Mapping[str, Sequence[Problem]]
    ) -> dict[str, dict[str, Any]]:
        """The figures of each set for what the engine serves."""
        return {
            name: measure(self._graded(engine, name, problems), self.settings.k)
            for name, problems in sets.items()
        }

    def _graded(self, engine: RolloutEngine, name: str, problems: Sequence[Problem]) -> list[Group]:
        draws = [Draw(p, self.settings.samples, (self.seed, "eval", name)) for p in problems]
        responses = sample(engine, self.format, draws, self.sampling)
        return self.grade([Group(p, r) for p, r in zip(problems, responses, strict=True)])
