"""Which problems a step visits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from gft_lite.data.difficulty import curriculum_order
from gft_lite.data.problems import problems_of_step
from gft_lite.recipe.schema import Recipe
from gft_lite.rollout.sampling import sample_seed
from gft_lite.types import Problem


@dataclass(frozen=True, slots=True)
class ProblemVisit:
    """A problem in a step (from 1) and in its epoch (from 0).

    `attempt` (from 0) numbers the samples drawn in one step: those that replace flat groups, or
    the epochs of presampled groups, have other seeds.
    """

    problem: Problem
    step: int
    epoch: int
    attempt: int = 0


def visits_of_step(
    recipe: Recipe, problems: Sequence[Problem], step: int, attempt: int = 0
) -> list[ProblemVisit]:
    """The problems of a step, in order; every further attempt has others."""
    per_step = recipe.train.problems_per_step
    first = (step - 1) * per_step
    seed = sample_seed(recipe.seed, "attempt", attempt) if attempt else recipe.seed
    curriculum, order_of = recipe.data.curriculum, None
    if curriculum is not None:
        success = [problem.success or 0.0 for problem in problems]
        order_of = partial(curriculum_order, success, curriculum, per_step, seed)
    found = problems_of_step(problems, step - 1, per_step, seed, order_of)
    return [
        ProblemVisit(problem, step, (first + i) // len(problems), attempt)
        for i, problem in enumerate(found)
    ]


def presampled_visits(
    recipe: Recipe, problems: Sequence[Problem], epochs: int
) -> Iterator[ProblemVisit]:
    """The visits of all the recipe's steps in its first `epochs` epochs."""
    most = math.ceil(epochs * len(problems) / recipe.train.problems_per_step)
    for step in range(1, min(recipe.steps or most, most) + 1):
        for visit in visits_of_step(recipe, problems, step):
            if visit.epoch < epochs:
                yield ProblemVisit(visit.problem, step, visit.epoch, attempt=visit.epoch)
