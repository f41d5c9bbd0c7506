"""The data of a run: training problems, held-out problems and evaluation sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from gft_lite.data.problems import (
    Loaded,
    answer_errors,
    distinct_notes,
    load_problems,
    split_holdout,
    with_usable_demonstrations,
)
from gft_lite.data.prompts import PromptFormat
from gft_lite.objective.methods import find_method
from gft_lite.policy.base import Policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import DataSettings
from gft_lite.rewards.registry import is_judge
from gft_lite.training.difficulty import Difficulty
from gft_lite.training.evaluation_schedule import size_notes
from gft_lite.training.groups import compose, demonstrations
from gft_lite.types import Group, Problem
from gft_lite.utils.errors import RecipeError

CHECKED_PROBLEMS = 64  # Whose demonstrations are graded at the start.


@dataclass(frozen=True)
class RunData:
    """What the recipe's data sections give; `fingerprints` identify it when a run is resumed."""

    problems: Sequence[Problem]
    held_out: Sequence[Problem]
    eval_sets: Mapping[str, Sequence[Problem]]
    fingerprints: Mapping[str, str]


def load_run_data(
    recipe: Recipe, policy: Policy, console: Console, difficulty: Difficulty | None = None
) -> RunData:
    """Read all data sets of the recipe; `difficulty` selects from the training problems.

    Raises: RecipeError for a data set that can't be used.
    """
    used = recipe.group.expert + recipe.group.teacher > 0
    used |= find_method(recipe.method).uses_demonstrations
    load = partial(_load, recipe, policy, console)
    loaded = {"data": load("data", recipe.data, demonstrations=used)}
    for name, settings in recipe.eval.sets.items():
        loaded[f"eval.sets.{name}"] = load(f"eval.sets.{name}", settings)
    for note in distinct_notes(loaded.values()):
        console.print(note, markup=False, soft_wrap=True)
    _check_answers(recipe, loaded)
    problems, held_out = split_holdout(loaded["data"].problems, recipe.data.holdout)
    if copies := len(loaded["data"].problems) - len(problems) - len(held_out):
        console.print(f"data: {copies} copies of held-out problems left out of training")
    if difficulty:
        problems = difficulty.select(problems, console)
    eval_sets = {name: loaded[f"eval.sets.{name}"].problems for name in recipe.eval.sets}
    known = not answer_errors("data", loaded["data"].columns, held_out, recipe.reward)
    eval_sets = eval_sets or ({"held_out": held_out} if held_out and known else {})
    for note in size_notes(recipe.eval, eval_sets):
        console.print(note, markup=False, soft_wrap=True)
    return RunData(
        _with_demonstrations(problems, recipe, console),
        held_out,
        eval_sets,
        {field: data.fingerprint() for field, data in loaded.items()},
    )


def _check_answers(recipe: Recipe, loaded: Mapping[str, Loaded]) -> None:
    """Check that data have the answers that a reward function compares with, if they need them.

    Raises: RecipeError for training data whose rewards are needed and that have none, and for an
        evaluation set with neither answers nor demonstrations.
    """
    rule = recipe.reward.answer_rule(loaded["data"].columns)
    graded = find_method(recipe.method).group_advantages
    errors = [f"data.columns.answer: {rule}, got null."] if rule and graded else []
    for field, data in loaded.items():
        if field != "data":
            errors += answer_errors(field, data.columns, data.problems, recipe.reward)
    if errors:
        raise RecipeError(errors)


def _load(
    recipe: Recipe, policy: Policy, console: Console, field: str, settings: DataSettings,
    *, demonstrations: bool = False,
) -> Loaded:  # fmt: skip
    """A data set; without the demonstrations that training or evaluation would have to cut."""
    max_tokens = recipe.rollout.max_tokens
    # One token more: an engine must generate one token to score a completion.
    reserve = max_tokens + 1
    if reserve >= policy.context:
        raise RecipeError(
            [f"rollout.max_tokens: must leave room for a prompt in the model's context of "
             f"{policy.context} tokens, got {max_tokens}."]
        )  # fmt: skip
    format = PromptFormat(policy.tokenizer, settings.prompt, f"{field}.prompt")
    loaded = load_problems(settings, format, context=policy.context, reserve=reserve, field=field)
    ungraded = recipe.reward.answer_rule(loaded.columns) is not None
    if demonstrations or ungraded:
        loaded = with_usable_demonstrations(loaded, format, max_tokens, field)
    console.print(f"{field}: {loaded.describe()}")
    for example in loaded.examples:
        console.print(f"  {example}", markup=False)
    return loaded


def check_demonstrations(
    recipe: Recipe,
    problems: Sequence[Problem],
    format: PromptFormat,
    grade: Callable[[Sequence[Group]], list[Group]],
    console: Console,
) -> None:
    """Grade the demonstrations of the first problems and print how many are right.

    Raises: RecipeError if none is, as then no group can teach anything: the answer column and the
        demonstrations don't fit, or the reward rule does not read them.
    """
    if any(
        is_judge(f.name) and f.parameters.get("mode") == "rank" for f in recipe.reward.functions
    ):
        return  # A ranking of demonstrations alone is paid for, and not needed later.
    composed = [compose(problem, recipe.group) for problem in problems[:CHECKED_PROBLEMS]]
    groups = [
        Group(problem, demonstrations(composition, format, recipe.rollout.stop))
        for problem, composition in zip(problems, composed, strict=False)
        if composition and (composition.experts or composition.teachers)
    ]
    responses = [response for group in grade(groups) for response in group]
    graded = [r for r in responses if r.correct is not None]
    if not graded or not find_method(recipe.method).group_advantages:
        return
    right = sum(bool(r.correct) for r in graded)
    console.print(
        f"demonstrations: {right} of {len(graded)} are right, those of {len(groups)} problems"
    )
    if not right:
        problem, text = groups[0].problem, groups[0].responses[0].text
        raise RecipeError(
            [f"data.columns.answer: must be the answer that demonstrations give, got "
             f"{problem.answer!r} beside a demonstration that ends with {text[-60:]!r}, and so in "
             f"{len(groups)} problems. Check data.columns, answer_from and reward.functions."]
        )  # fmt: skip


def _with_demonstrations(
    problems: Sequence[Problem], recipe: Recipe, console: Console
) -> tuple[Problem, ...]:
    """The problems whose demonstrations can fill a group under the shortfall rule."""
    kept = tuple(p for p in problems if compose(p, recipe.group) is not None)
    if find_method(recipe.method).uses_demonstrations:
        demonstrated = tuple(p for p in kept if p.experts)
        if without := len(kept) - len(demonstrated):
            console.print(f"method: {recipe.method}: {without} problems without an expert dropped")
        kept = demonstrated
    short = sum(
        len(p.experts) < recipe.group.expert or len(p.teachers) < recipe.group.teacher
        for p in problems
    )
    if short:
        console.print(
            f"group.shortfall: {recipe.group.shortfall}: {short} of {len(problems)} problems have "
            f"fewer demonstrations than the group asks for; {len(problems) - len(kept)} dropped"
        )
    if not kept:
        raise RecipeError(
            [f"group: must find its demonstrations in the data, but none of {len(problems)} "
             "problems has them. Check data.columns.expert and .teacher, or group.shortfall."]
        )  # fmt: skip
    return kept
