"""The evaluation sets of a recipe or a suite: sampled and graded, or scored by likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gft_lite.data.problems import is_ungraded
from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.likelihood import measure_likelihood, scoring
from gft_lite.evaluation.metrics import measure
from gft_lite.policy.base import Policy
from gft_lite.recipe.figures import check_names
from gft_lite.recipe.objective_sections import RewardSettings
from gft_lite.recipe.schema import Recipe
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
    """Evaluates named sets of problems, with equal seeds for every model: results pair.

    The engine samples responses, which are graded; where that needs answers and a set has none,
    the policy scores its demonstrations instead.
    """

    recipe: Recipe
    format: PromptFormat
    grade: Grade
    sampling: Sampling
    policy: Policy

    def evaluate(
        self, engine: RolloutEngine, sets: Mapping[str, Sequence[Problem]], *, base: bool = False
    ) -> dict[str, dict[str, Any]]:
        """The figures of each set for what the engine serves: the policy, or with `base` its base.

        Raises: RewardError for responses without a reward.
        """
        settings = self.recipe.eval
        ungraded = {n: p for n, p in sets.items() if is_ungraded(p, self.recipe.reward)}
        scored = self._scored(engine, ungraded, base=base) if ungraded else {}
        found = {
            name: scored.get(name) or measure(self._graded(engine, name, problems), settings.k)
            for name, problems in sets.items()
        }
        for figures in found.values():
            check_names(figures)
        return found

    def _scored(
        self, engine: RolloutEngine, sets: Mapping[str, Sequence[Problem]], *, base: bool
    ) -> dict[str, dict[str, Any]]:
        """The likelihood of each set's demonstrations, with the engine's memory."""
        limit = int(self.recipe.train.micro_batch_tokens)
        with scoring(self.policy, engine, base=base):
            return {name: measure_likelihood(self.policy, self.format, problems, limit)
                    for name, problems in sets.items()}  # fmt: skip

    def _graded(self, engine: RolloutEngine, name: str, problems: Sequence[Problem]) -> list[Group]:
        seed = (self.recipe.seed, "eval", name)
        draws = [Draw(p, self.recipe.eval.samples, seed) for p in problems]
        responses = sample(engine, self.format, draws, self.sampling)
        return self.grade([Group(p, r) for p, r in zip(problems, responses, strict=True)])
