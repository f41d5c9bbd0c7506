"""The groups of a step: draw problems, sample, attach demonstrations, score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random

from gft_lite.data.prompts import PromptFormat
from gft_lite.objective.advantages import advantages_of
from gft_lite.objective.method import call_with_parameters
from gft_lite.objective.methods import find_method
from gft_lite.recipe.method_parameters import bind_method
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import GroupSettings
from gft_lite.rollout.base import RolloutEngine, Sampling
from gft_lite.rollout.sampling import Draw, graded_text, sample, sample_seed
from gft_lite.runs.metrics import PhaseTimer, count_self_tokens
from gft_lite.training.presampled_groups import PresampledGroups
from gft_lite.training.visits import ProblemVisit, visits_of_step
from gft_lite.types import Group, Problem, Response, ScoredGroup, Source

Grade = Callable[[Sequence[Group]], list[Group]]


@dataclass(frozen=True, slots=True)
class StepGroups:
    """The scored groups of a step and the number of tokens that were sampled for them."""

    groups: list[ScoredGroup]
    rollout_tokens: int


class GroupBuilder:
    """Builds the scored groups of each step.

    `grade` gives responses their rewards. With `presampled` groups nothing is sampled.
    """

    def __init__(
        self,
        recipe: Recipe,
        problems: Sequence[Problem],
        engine: RolloutEngine,
        format: PromptFormat,
        grade: Grade,
        presampled: PresampledGroups | None = None,
    ) -> None:
        self.recipe, self.problems = recipe, problems
        self.engine, self.format = engine, format
        self.grade, self.presampled = grade, presampled
        self.sampling = training_sampling(recipe)

    def build(self, step: int, timer: PhaseTimer, progress: float = 0.0) -> StepGroups:
        """The groups of a step (from 1); `progress` is the share of the budget that is spent.

        Flat groups are replaced by those of other problems, at most `rollout.resample` times
        (dynamic sampling, arXiv 2503.14476).
        """
        visits = visits_of_step(self.recipe, self.problems, step)
        if self.presampled:
            return StepGroups(self.score(self.presampled.groups(visits)), 0)
        groups = self._sample_and_grade(visits, timer, progress)
        tokens = count_self_tokens(groups)
        for attempt in range(1, self.recipe.rollout.resample + 1):
            flat = sum(group.flat for group in groups)
            if not flat:
                break
            others = visits_of_step(self.recipe, self.problems, step, attempt)[:flat]
            fresh = self._sample_and_grade(others, timer, progress)
            tokens += count_self_tokens(fresh)
            useful = iter([group for group in fresh if not group.flat])
            groups = [next(useful, group) if group.flat else group for group in groups]
        return StepGroups(self.score(groups), tokens)

    def sample(self, visits: Sequence[ProblemVisit], progress: float = 0.0) -> list[Group]:
        """The groups of these visits without rewards, but for problems that are dropped."""
        composed = [
            (visit, composition)
            for visit in visits
            if (composition := compose(visit.problem, self.recipe.group, visit.epoch))
        ]
        draws = [self._draws(visit, c.self_samples, progress) for visit, c in composed]
        samples = iter(sample(self.engine, self.format, chain(*draws), self.sampling))
        return [
            Group(
                visit.problem,
                demonstrations(c, self.format, self.sampling.stop)
                + tuple(response for _ in of_visit for response in next(samples)),
            )
            for (visit, c), of_visit in zip(composed, draws, strict=True)
        ]

    def _draws(self, visit: ProblemVisit, count: int, progress: float) -> list[Draw]:
        """The draws of a visit: one, or one for each prefix of a demonstration."""
        seed = (self.recipe.seed, visit.step, visit.attempt)
        prefixes, experts = find_method(self.recipe.method).prefixes, visit.problem.experts
        if prefixes is None or not experts:
            return [Draw(visit.problem, count, seed)]
        random = Random(sample_seed(*seed, "prefix", visit.problem.id))
        shares = call_with_parameters(
            prefixes, count, progress, random, parameters=bind_method(self.recipe)
        )
        ids, _ = self.format.response_ids(experts[visit.epoch % len(experts)])
        most = min(len(ids), self.sampling.max_tokens) - 1  # Without the end token.
        lengths = Counter(min(int(share * len(ids)), most) for share in shares)
        return [Draw(visit.problem, n, seed, ids[:length]) for length, n in lengths.items()]

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Graded groups with their advantages; 1 each for methods that use no rewards."""
        method = find_method(self.recipe.method)
        if not method.group_advantages:
            return [ScoredGroup(group, (1.0,) * len(group)) for group in groups]
        return [ScoredGroup(group, self._advantages(group, method.baseline)) for group in groups]

    def _advantages(self, group: Group, sources: Sequence[Source]) -> tuple[float, ...]:
        """Advantages against the mean of these sources' samples; none begins with a prefix."""
        objective = self.recipe.objective
        baseline = [r.source in sources and not r.prefix for r in group]
        if not any(baseline):  # All begin with a prefix and are compared with each other.
            baseline = [r.source in sources for r in group]
        return tuple(
            advantages_of(group.rewards, std=objective.std, eps=objective.eps, baseline=baseline)
        )

    def _sample_and_grade(
        self, visits: Sequence[ProblemVisit], timer: PhaseTimer, progress: float
    ) -> list[Group]:
        with timer("rollout"):
            groups = self.sample(visits, progress)
        with timer("reward"):
            return self.grade(groups)


def training_sampling(recipe: Recipe) -> Sampling:
    """How the recipe's self samples are drawn."""
    r = recipe.rollout
    return Sampling(r.temperature, r.top_p, r.top_k, r.max_tokens, tuple(r.stop))


@dataclass(frozen=True, slots=True)
class Composition:
    """The demonstrations of one group, as texts, and its number of self samples."""

    experts: tuple[str, ...]
    teachers: tuple[str, ...]
    self_samples: int


def compose(problem: Problem, settings: GroupSettings, epoch: int = 0) -> Composition | None:
    """The composition of the problem's group in an epoch; None drops the problem.

    A problem with more demonstrations than needed uses others in each epoch. With fewer,
    `group.shortfall` decides: `self` samples replace the missing ones, the existing ones are
    `repeat`ed, or the problem is `drop`ped, as it is if there is none to repeat.
    """
    taken, missing = [], 0
    for pool, wanted in (
        (problem.experts, settings.expert),
        (problem.teachers, settings.teacher),
    ):
        short = max(wanted - len(pool), 0)
        if short and (
            settings.shortfall == "drop" or (settings.shortfall == "repeat" and not pool)
        ):
            return None
        missing += short if settings.shortfall == "self" else 0
        count = wanted if settings.shortfall == "repeat" else wanted - short
        taken.append(tuple(pool[(epoch * wanted + i) % len(pool)] for i in range(count)))
    return Composition(taken[0], taken[1], settings.self + missing)


def demonstrations(
    composition: Composition, format: PromptFormat, stop: Sequence[str] = ()
) -> tuple[Response, ...]:
    """The expert and teacher responses of a composition, tokenised.

    They are graded as a sample of equal tokens is: up to the first stop string.
    """
    pairs: list[tuple[Source, str]] = [
        *(("expert", text) for text in composition.experts),
        *(("teacher", text) for text in composition.teachers),
    ]
    found = [format.demonstration(text, source) for source, text in pairs]
    return tuple(replace(r, text=graded_text(r.token_ids, format, stop)) for r in found)
