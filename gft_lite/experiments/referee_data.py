"""The data of a referee: no problem of the tuning set may be trained on or compared on."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from gft_lite.data.problems import load_problems, problem_key
from gft_lite.data.prompts import PromptFormat
from gft_lite.experiments.referee_plan import RefereePlan
from gft_lite.policy.load_errors import LOAD_ERRORS
from gft_lite.policy.model_checks import longest_context
from gft_lite.policy.registry import model_location
from gft_lite.recipe.sections import DataSettings
from gft_lite.rollout.prompt_check import load_tokenizer
from gft_lite.types import Problem
from gft_lite.utils.errors import UserError


def check_data(plan: RefereePlan) -> None:
    """Read the data as the runs will do.

    Raises: UserError if the tuning set shares problems with the training data or with another set.
    """
    policy, recipe = plan.recipe.policy, plan.recipe
    try:
        tokenizer = load_tokenizer(policy)
        config = transformers.AutoConfig.from_pretrained(
            model_location(policy.model), revision=policy.revision,
            trust_remote_code=policy.trust_remote_code,
        )  # fmt: skip
    except LOAD_ERRORS:
        return  # The first run says what is wrong with the model.
    limit = longest_context(config)

    def read(settings: DataSettings, field: str) -> Sequence[Problem]:
        format = PromptFormat(tokenizer, settings.prompt, f"{field}.prompt")
        return load_problems(
            settings, format, context=min(policy.context or limit, limit),
            reserve=recipe.rollout.max_tokens + 1, field=field,
        ).problems  # fmt: skip

    training = recipe.data.model_copy(update={"skip": plan.skip or recipe.data.skip})
    tune = {problem_key(problem) for problem in read(plan.tune_set, "--tune-set")}
    others = {"data": training} | {f"eval.sets.{name}": each for name, each in plan.sets.items()}
    problems = []
    for field, settings in others.items():
        shared = sum(problem_key(problem) in tune for problem in read(settings, field))
        if shared:
            rule = f"{field}: must have no problem of the tuning set, got {shared} of them"
            problems.append(f"{rule}. Name another set as --tune-set, or remove them.")
    if problems:
        raise UserError(problems)
