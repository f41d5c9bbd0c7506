"""Sections of a recipe about the course of a run: evaluations, checkpoints, guard and output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gft_lite.recipe.base import Settings, Share, Temperature, at_most
from gft_lite.recipe.data_sections import DataSettings
from gft_lite.recipe.effects import EVALUATION, NO_RESULT, TRAINING
from gft_lite.recipe.figures import COMPARED, lower_is_better


class MonitorSettings(Settings):
    """The measurement of the KL to the reference while training."""

    every: Annotated[NonNegativeInt, TRAINING] = 10
    """Measure the KL every N steps, on the reference's responses to fixed prompts and on the step's
    self samples; 0: only at the end, on the former."""
    problems: Annotated[PositiveInt, EVALUATION] = 16
    """Number of held-out problems whose prompts are used for the KL, of training problems where
    none are held out."""


def _without_removed(value: Any) -> Any:
    """The sets of a recipe: null in place of a set, or of all, removes what it extends."""
    if isinstance(value, Mapping):
        return {name: data for name, data in value.items() if data is not None}
    return {} if value is None else value


class EvalSettings(Settings):
    """The evaluation of base and trained policy on named sets.

    Responses are sampled and graded; a set without answers, where the reward compares with them, is
    evaluated by the likelihood of its demonstrations.
    """

    sets: Annotated[
        dict[str, DataSettings],
        BeforeValidator(
            _without_removed, json_schema_input_type=dict[str, DataSettings | None] | None
        ),
        EVALUATION,
    ] = {}
    """Sets by name; the first is the headline. Empty: the held-out problems, as set `held_out`.
    null in place of a set, or of all, removes those of an extended recipe."""
    samples: Annotated[PositiveInt, at_most(100_000), EVALUATION] = 8
    """Number of responses to a problem; more narrow the intervals and cost time."""
    k: Annotated[list[PositiveInt], EVALUATION] = [1, 8]
    """The k of pass@k, the chance that at least one of k responses is correct. k = 1 is always
    there; none may be above `samples`."""
    temperature: Annotated[Temperature, EVALUATION] = 0.5
    """Sampling temperature of evaluations; 0: greedy, for which one sample is enough."""
    top_p: Annotated[Share, EVALUATION] = 1.0
    """As `rollout.top_p`, for evaluations."""
    max_tokens: Annotated[PositiveInt | None, EVALUATION] = None
    """Most tokens of a response; null: `rollout.max_tokens`."""
    every: Annotated[NonNegativeInt, TRAINING] = 0
    """Evaluate also after every N training steps and after the last one; the base's figures are
    those of step 0. 0: only the base and the trained policy."""
    problems: Annotated[PositiveInt | None, TRAINING] = None
    """Most problems of a set in the evaluations of `every`, the same in every run; null: all."""

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSettings:
        if self.k and max(self.k) > self.samples:
            raise ValueError(f"k: must be at most eval.samples, which is {self.samples}")
        return self

    def figures_of(self, sets: Iterable[str]) -> list[str]:
        """The figures that an evaluation of sets can have, such as `SET/pass@1`."""
        ks = sorted({1, *self.k})
        return [f"{name}/{of}" for name in sets for figure in COMPARED for of in figure.names(ks)]


class FigureSettings(Settings):
    """A figure to compare by, and whether the highest or the lowest is the best."""

    metric: str | None = None
    """The figure, such as `test/pass@1`."""
    mode: Literal["max", "min"] = "max"
    """Whether the highest or the lowest value is the best; for `nll` the default is `min`."""

    @model_validator(mode="before")
    @classmethod
    def _by_figure(cls, tree: Any) -> Any:
        """Add the figure's own `mode` where none is given."""
        if isinstance(tree, Mapping) and lower_is_better(tree.get("metric")):
            return {"mode": "min", **tree}
        return tree


class BestSettings(FigureSettings):
    """The figure by which the evaluations of `eval.every` are compared."""

    metric: str
    """A set and one of its figures, such as `test/pass@1`, `test/mean_reward` or `test/nll`."""


class CheckpointSettings(Settings):
    """The checkpoints, from which a run resumes."""

    every: Annotated[PositiveInt, NO_RESULT] = 25
    """Write a checkpoint every N steps, and after the last."""
    keep: Annotated[PositiveInt, NO_RESULT] = 2
    """Number of the newest checkpoints that remain on disk."""
    best: Annotated[BestSettings | None, TRAINING] = None
    """Figure by which evaluations are compared: each that is better than all before it writes a
    checkpoint, and the best one's is kept beside the newest; of equal ones it is the earliest.
    null: none is compared."""
    adapter: Annotated[Literal["last", "best"], TRAINING] = "last"
    """Policy that `adapter/` and the final evaluation are of: the last, or that of `best`."""

    @model_validator(mode="after")
    def _best_is_known(self) -> CheckpointSettings:
        if self.adapter == "best" and self.best is None:
            raise ValueError("adapter: must be last without checkpoint.best")
        return self


class EarlyStopSettings(Settings):
    """The end of training where evaluations no longer improve.

    An evaluation is an improvement if the 95% paired bootstrap interval, over problems, of its
    difference to the last improvement (at first the base) lies above `min_delta`. The figure is
    `checkpoint.best.metric`, by default the headline.
    """

    patience: PositiveInt | None = None
    """Number of evaluations in a row without an improvement that ends training; null: never."""
    min_delta: NonNegativeFloat = 0.0
    """Least improvement that counts, in units of the figure."""


class GuardSettings(Settings):
    """Alarms on the metrics of training for a policy that collapses; null switches an alarm off.

    Alarms `reward` and `entropy` need a change of more than five standard errors, estimated from
    the differences between steps.
    """

    action: Literal["none", "warn", "stop", "rollback"] = "warn"
    """What follows an alarm that was not there at the step before: `warn` prints it, `stop` ends
    training, and `rollback` returns to the best checkpoint, or without `checkpoint.best` to the
    last one from before the window, and lowers the learning rate; the steps go on counting. `none`
    checks nothing."""
    window: PositiveInt = 5
    """Number of the last steps that means are over, of those that have the metric."""
    reward: Share | None = 0.25
    """Alarm if the mean reward of self samples is lower than its highest mean by this share."""
    flat_groups: Share | None = 0.9
    """Alarm if in at least this share of the window's groups (20 or more) all rewards are equal, so
    that they teach nothing, while the reward is nearer to its lowest than to its highest."""
    entropy: Annotated[float, Field(gt=1)] | None = 2.5
    """Alarm if the mean entropy is at least this many times its lowest mean."""
    entropy_low: PositiveFloat | None = 0.005
    """Alarm if the mean entropy is at most so many nats per token."""
    grad_norm: Annotated[float, Field(gt=1)] | None = 20.0
    """Alarm if the mean gradient norm is at least this many times the median of all steps."""
    kl: PositiveFloat | None = 1.0
    """Alarm if the last KL(reference || policy) on the fixed prompts of `monitor` is at least so
    many nats per token."""
    engine_gap: PositiveFloat | None = 0.1
    """Alarm if the last mean difference between the log-probs of engine and trainer is at least so
    many nats per token."""
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What a rollback multiplies the learning rate by."""
    rollbacks: PositiveInt = 2
    """Most rollbacks of a run; the next alarm ends training."""


def course_rules(
    evaluation: EvalSettings, checkpoint: CheckpointSettings, early_stop: EarlyStopSettings,
    guard: GuardSettings, steps: int | None, sets: Sequence[str],
) -> list[str]:  # fmt: skip
    """The rules between evaluations, checkpoints and guard that a recipe of `steps` breaks."""
    rules = []
    every, best = evaluation.every, checkpoint.best
    if every and not sets:
        rules.append("eval.every: must be 0 without eval.sets and data.holdout")
    uses = {"checkpoint.best": best, "early_stop.patience": early_stop.patience}
    for field in (name for name, value in uses.items() if value is not None):
        if not every:
            rules.append(f"{field}: must be null without eval.every")
        elif steps is not None and every > steps:
            rules.append(f"eval.every: must be at most the number of steps, {steps}, with {field}")
    figures = evaluation.figures_of(sets)
    if best and best.metric not in figures:
        names = ", ".join(figures) or "of a set of eval.sets"
        rules.append(f"checkpoint.best.metric: must be one of {names}")
    if guard.action == "rollback" and steps is not None and checkpoint.every > steps:
        rule = f"must be at most the number of steps, {steps}, with guard.action rollback"
        rules.append(f"checkpoint.every: {rule}")
    return rules


class LogSettings(Settings):
    """Output in addition to metrics.jsonl."""

    groups: bool = True
    """Write every response with its rewards to `groups/`, which the report's browser shows."""
    tokens: bool = False
    """Record log-probs and the loss's coefficient of each trained token of a step's first 8 groups,
    and each source's gradient at step 1 and every `monitor.every`-th; takes further passes."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers that receive the numbers of each step; they come with the extra `trackers`."""
    completions: NonNegativeInt = 2
    """Number of groups of a step whose responses trackers receive as a table; 0: none."""
