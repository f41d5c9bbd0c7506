"""Sections of a recipe about the loss and the reward."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gft_lite.recipe.base import Fraction, Settings, at_most, named_in
from gft_lite.recipe.effects import EVALUATION, EVERYTHING, NO_RESULT
from gft_lite.recipe.sections import ColumnsSettings
from gft_lite.rewards.base import RewardError, RewardFunction
from gft_lite.rewards.registry import JUDGES, REWARDS, is_judge, make_rule


class ImportanceSettings(Settings):
    """The weights p_trainer / p_engine of self tokens, which correct for a sampling engine that
    computes other log-probs than the trainer (`objective/importance.py` has the modes).

    `auto`: `token_truncate` for methods that compare with the sampling policy (GRPO and its kin),
    unless the transformers engine samples with the trainer's own weights; else `none`.
    """

    mode: Literal["auto", "none", "token_truncate", "token_band", "sequence_mask"] = "auto"
    cap: PositiveFloat = 2.0
    low: NonNegativeFloat = 0.5
    high: PositiveFloat = 5.0


class ObjectiveSettings(Settings):
    """The loss; a method uses the fields that are parameters of its loss function.

    `kl` is the weight of the k3 estimate of KL(policy || reference) in the per-token loss of any
    method (TRL's `beta`, without the correction by rho that TRL may apply); `lam` is asft's.
    `entropy` is the weight of an entropy bonus in nats, the token mean over all rows of the step.
    `mask_truncated` excludes rows at the length limit, also from the reduction's denominator.
    A method's own parameters are extra fields, which `objective_schema.py` checks.
    """

    model_config = ConfigDict(extra="allow")

    tau: NonNegativeFloat = 0.7
    std: Literal["sample", "population", "none"] = "sample"
    eps: PositiveFloat = 1e-6
    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.2
    lam: NonNegativeFloat = 0.1
    kl: NonNegativeFloat = 0.0
    entropy: NonNegativeFloat = 0.0
    importance: ImportanceSettings = ImportanceSettings()
    mask_truncated: bool = False


class RewardFunctionSettings(Settings):
    """One reward function and its weight in the sum.

    `correct_above`: a response with a score above this is correct, which pass@k counts; by default
    0.5 for math, choice and exact, and none for other functions. The first function with such a
    threshold decides; without any, evaluations have the mean reward instead of pass@k. Several
    judges have names of their own, such as judge-style and judge-facts.
    """

    name: Annotated[str, named_in(REWARDS, JUDGES)]
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    parameters: dict[str, Any] = {}
    correct_above: float | None = None

    @model_validator(mode="after")
    def _judge_has_parameters(self) -> RewardFunctionSettings:
        """Check a judge, which costs money, before anything is loaded."""
        if is_judge(self.name):
            try:
                make_rule(RewardFunction(self.name, parameters=self.parameters))
            except RewardError as error:
                rule, _, got = str(error).partition("parameters ")[2].partition(", got ")
                value = got.partition(". For example ")[0]
                raise ValueError(f"parameters: {rule}, not {value}") from error
        return self


def _reward_shorthand(value: Any) -> Any:
    items = [value] if isinstance(value, (str, dict)) else value
    if not isinstance(items, list):
        return items
    return [{"name": item} if isinstance(item, str) else item for item in items]


class RewardSettings(Settings):
    """The reward: a weighted sum of functions, computed in worker processes.

    `timeout` is in seconds for a response: CPU time for the rules of this package, and a fourth of
    the time on the clock for functions of your own. `concurrency` is the number of calls of an
    `async def` function, or of requests to a judge, at a time.
    """

    functions: Annotated[
        list[RewardFunctionSettings],
        BeforeValidator(_reward_shorthand),
        Field(min_length=1),
        EVERYTHING,
    ] = Field(default_factory=lambda: [RewardFunctionSettings(name="math")])
    workers: Annotated[PositiveInt, at_most(1024), NO_RESULT] = 2
    timeout: Annotated[PositiveFloat, at_most(86_400), EVALUATION] = 3.0
    concurrency: Annotated[PositiveInt, at_most(1024), NO_RESULT] = 8

    def answer_rule(self, columns: ColumnsSettings) -> str | None:
        """The rule that `columns` break by having no answers, if a function compares with them."""
        needy = [f.name for f in self.functions
                 if f.name in REWARDS and REWARDS[f.name].needs_answer]  # fmt: skip
        if not needy or columns.answer is not None:
            return None
        return f"must name a column, as reward {', '.join(needy)} compares with it"
