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
from gft_lite.recipe.data_sections import ColumnsSettings
from gft_lite.recipe.effects import EVALUATION, EVERYTHING, NO_RESULT
from gft_lite.rewards.base import RewardError, RewardFunction
from gft_lite.rewards.registry import JUDGES, REWARDS, is_judge, make_rule


class ImportanceSettings(Settings):
    """The weights w = p_trainer / p_engine of self tokens, which correct for a sampling engine that
    computes other log-probs than the trainer."""

    mode: Literal["auto", "none", "token_truncate", "token_band", "sequence_mask"] = "auto"
    """Limit: `token_truncate` is min(w, cap), `token_band` 0 outside of [low, high],
    `sequence_mask` a row's product, and 0 above cap. `auto`: `token_truncate` for methods with a
    ratio p / p_old of self samples, such as GRPO, unless the engine is `transformers`, which has
    the trainer's weights; else `none`."""
    cap: PositiveFloat = 2.0
    """Limit of `token_truncate` for a token, and of `sequence_mask` for a row."""
    low: NonNegativeFloat = 0.5
    """Lower limit of `token_band`."""
    high: PositiveFloat = 5.0
    """Upper limit of `token_band`."""


class ObjectiveSettings(Settings):
    """The loss; a method uses the fields that are parameters of its loss function.

    Defaults differ between methods; the parameters of a method of your own are fields too.
    """

    model_config = ConfigDict(extra="allow")

    tau: NonNegativeFloat = 0.7
    """Probability below which GFT rectifies a token: its weight is p instead of 1. 0 rectifies
    none. The paper has 0.7, the authors' script 0.1."""
    std: Literal["sample", "population", "none"] = "sample"
    """Standard deviation that advantages are divided by: with K - 1 (`sample`) or K in the
    denominator, or none."""
    eps: PositiveFloat = 1e-6
    """Number added to the standard deviation of the rewards; without effect with `std: none`."""
    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Mean of the loss in a step: over all tokens, over the means of rows, or the sum divided by
    rows times `rollout.max_tokens` (Dr. GRPO)."""
    clip_low: Fraction = 0.2
    """Ratios p / p_old below 1 - clip_low have no gradient where the advantage is negative."""
    clip_high: NonNegativeFloat = 0.2
    """Ratios p / p_old above 1 + clip_high have no gradient where the advantage is positive; raise
    it to let rare tokens grow (DAPO: 0.28)."""
    lam: NonNegativeFloat = 0.1
    """Weight of ASFT's exact KL(reference || policy)."""
    kl: NonNegativeFloat = 0.0
    """Weight of the k3 estimate of KL(policy || reference), added to the loss of any method (TRL's
    `beta`, without its correction by the ratio)."""
    entropy: NonNegativeFloat = 0.0
    """Weight of an entropy bonus in nats, the token mean over all rows of the step; keeps the
    policy from becoming deterministic."""
    importance: ImportanceSettings = ImportanceSettings()
    """Correction for an engine that computes other log-probs than the trainer."""
    mask_truncated: bool = False
    """Leave out rows that reached the length limit, from the denominator of the mean too."""


class RewardFunctionSettings(Settings):
    """One reward function and its weight in the sum."""

    name: Annotated[str, named_in(REWARDS, JUDGES)]
    """A function of this package, such as `math`, `exact` or `judge`, or the dotted path of your
    own. Several judges have names such as `judge-style` and `judge-facts`."""
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Factor of its score in the sum; 0 only measures, a negative one is a penalty."""
    parameters: dict[str, Any] = {}
    """Keyword arguments of the function, by name."""
    correct_above: float | None = None
    """A response with a score above this is correct, which pass@k counts. null: 0.5 for math,
    choice and exact, none for others. The first function with a threshold decides; without any,
    evaluations have the mean reward."""

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


_Written = str | RewardFunctionSettings


def _reward_shorthand(value: Any) -> Any:
    items = [value] if isinstance(value, (str, dict)) else value
    if not isinstance(items, list):
        return items
    return [{"name": item} if isinstance(item, str) else item for item in items]


class RewardSettings(Settings):
    """The reward: a weighted sum of functions, computed in worker processes."""

    functions: Annotated[
        list[RewardFunctionSettings],
        BeforeValidator(_reward_shorthand, json_schema_input_type=_Written | list[_Written]),
        Field(min_length=1),
        EVERYTHING,
    ] = Field(default_factory=lambda: [RewardFunctionSettings(name="math")])
    """The functions that are added up: a name, a mapping as in `reward.functions[]`, or a list of
    these."""
    workers: Annotated[PositiveInt, at_most(1024), NO_RESULT] = 2
    """Number of processes that grade by `math`, `choice` and `format`."""
    timeout: Annotated[PositiveFloat, at_most(86_400), EVALUATION] = 3.0
    """Seconds for a response: CPU time for `math`, `choice` and `format`; a function of your own
    may take four times that on the clock. A judge has a `timeout` among its parameters."""
    concurrency: Annotated[PositiveInt, at_most(1024), NO_RESULT] = 8
    """Number of calls of an `async def` function, or of requests to a judge, at a time."""

    def answer_rule(self, columns: ColumnsSettings) -> str | None:
        """The rule that `columns` break by having no answers, if a function compares with them."""
        needy = [f.name for f in self.functions
                 if f.name in REWARDS and REWARDS[f.name].needs_answer]  # fmt: skip
        if not needy or columns.answer is not None:
            return None
        return f"must name a column, as reward {', '.join(needy)} compares with it"
