"""Sections of a recipe about the course of training, its evaluation and its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gft_lite.objective.methods import METHODS
from gft_lite.recipe.base import (
    Fraction,
    Settings,
    Share,
    Temperature,
    at_most,
    matching,
    named_in,
)
from gft_lite.recipe.effects import EVALUATION, NO_RESULT, TRAINING
from gft_lite.recipe.sections import DataSettings
from gft_lite.utils.errors import RecipeError


class OptimSettings(Settings):
    """The optimiser and its schedule.

    `lr: auto` is a rule by the model's width, the adapter's scale and the method
    (planning/learning_rate.py). `lora_plus_ratio` is the rate of the adapter's B over that of its
    A, which is `lr` (LoRA+, arXiv 2402.12354). After `max_bad_steps` steps in a row with a
    non-finite loss or gradient, training fails.
    """

    name: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"
    lr: Literal["auto"] | PositiveFloat = 1e-4
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: Fraction = 0.05
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip_norm: PositiveFloat = 1.0
    max_bad_steps: PositiveInt = 3

    @property
    def rate(self) -> float:
        """The learning rate. Raises: RecipeError if it is `auto` still."""
        if self.lr == "auto":
            raise RecipeError(["optim.lr: must be a number here, got auto. Set optim.lr."])
        return self.lr

    def is_paged(self, device: str) -> bool:
        """True for the paged 8-bit optimiser (arXiv 2305.14314), which `auto` is with CUDA."""
        return self.name == "paged_adamw_8bit" or (
            self.name == "auto" and device.startswith("cuda")
        )


class TrainSettings(Settings):
    """The number and size of steps; a step is a rollout of `problems_per_step` groups.

    `drop_zero_advantage` drops rows without effect on the gradient before the forward pass.
    `memory` is the limit of the memory plan; `auto` is the free memory of the device.
    """

    steps: Annotated[PositiveInt, TRAINING] = 100
    problems_per_step: Annotated[PositiveInt, at_most(1_000_000), TRAINING] = 16
    updates_per_rollout: Annotated[PositiveInt, TRAINING] = 1
    micro_batch_tokens: Annotated[Literal["auto"] | PositiveInt, NO_RESULT] = 8192
    memory: Annotated[
        str,
        matching(r"auto|(?=.*[1-9])\d+(\.\d+)? ?[GM]i?B", "must be auto or a size such as 8GiB"),
        NO_RESULT,
    ] = "auto"
    drop_zero_advantage: Annotated[bool, TRAINING] = True

    @model_validator(mode="after")
    def _updates_fit(self) -> TrainSettings:
        if self.updates_per_rollout > self.problems_per_step:
            rule = f"must be at most train.problems_per_step, which is {self.problems_per_step}"
            raise ValueError(f"updates_per_rollout: {rule}")
        return self


class BudgetSettings(Settings):
    """A limit in place of `train.steps`, to compare methods at equal cost.

    `problems` counts visits of problems, `trajectories` responses, `tokens` the tokens of all
    responses of the groups, `seconds` the time of rollouts, rewards, updates and syncs, not that of
    evaluations. The step that reaches the limit is the last.
    """

    problems: PositiveInt | None = None
    trajectories: PositiveInt | None = None
    tokens: PositiveInt | None = None
    seconds: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_at_most(self) -> BudgetSettings:
        known = dict(self)
        given = [name for name, amount in known.items() if amount is not None]
        if len(given) > 1:
            raise ValueError(f"must name one of {', '.join(known)}, not {given}")
        return self


class StageSettings(Settings):
    """A stage of a staged run: its method, and the fields in which it differs from the recipe.

    `reference: start` measures the stage's KL to the policy at the start of the stage.
    """

    method: Annotated[str, named_in(METHODS)]
    reference: Literal["base", "start"] = "base"
    overrides: dict[str, Any] = {}


def stage_shorthand(value: Any) -> Any:
    """A stage from the name of its method alone."""
    return {"method": value} if isinstance(value, str) else value


class TeacherSettings(Settings):
    """The model whose log-probs on the policy's own samples methods `sdft` and `opd` learn from.

    `model`: `base`, the policy without its adapter; `average`, a copy of the adapter that becomes
    decay * copy + (1 - decay) * adapter after each update; the folder of an adapter of the same
    base, rank and alpha; or a model with the same tokenizer, loaded as the policy is (the memory
    plan does not count it). `template` is the teacher's prompt where it sees a demonstration.
    """

    model: Annotated[str, Field(min_length=1)] = "base"
    decay: Fraction = 0.95
    template: str = (
        "{problem}\n\nHere is an example of a good answer:\n\n{demonstration}\n\n"
        "Now write your own answer."
    )

    @model_validator(mode="after")
    def _template_is_complete(self) -> TeacherSettings:
        for name in ("{problem}", "{demonstration}"):
            if name not in self.template:
                raise ValueError(f"template: must contain {name}")
        return self


class MonitorSettings(Settings):
    """The KL to the reference on fixed held-out prompts, every N steps (0: never)."""

    every: Annotated[NonNegativeInt, TRAINING] = 10
    problems: Annotated[PositiveInt, EVALUATION] = 16


class EvalSettings(Settings):
    """The evaluation of base and trained policy on named sets; the first is the headline.

    Without `sets`, it is of the held-out problems, as the set `held_out`. Responses are sampled and
    graded; a set without answers, where the reward compares with them, is evaluated by the
    likelihood of its demonstrations. `every`: also after every N training steps and after the last
    one (0: never), on at most `problems` of each set, which are the same in every run. The base's
    figures are those of step 0.
    """

    sets: Annotated[dict[str, DataSettings], EVALUATION] = {}
    samples: Annotated[PositiveInt, at_most(100_000), EVALUATION] = 8
    k: Annotated[list[PositiveInt], EVALUATION] = [1, 8]
    temperature: Annotated[Temperature, EVALUATION] = 0.5
    top_p: Annotated[Share, EVALUATION] = 1.0
    max_tokens: Annotated[PositiveInt | None, EVALUATION] = None
    every: Annotated[NonNegativeInt, TRAINING] = 0
    problems: Annotated[PositiveInt | None, TRAINING] = None

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSettings:
        if self.k and max(self.k) > self.samples:
            raise ValueError(f"k: must be at most eval.samples, which is {self.samples}")
        return self

    def figures_of(self, sets: Iterable[str]) -> list[str]:
        """The figures that an evaluation of sets can have, such as `SET/pass@1`."""
        names = [*(f"pass@{k}" for k in sorted({1, *self.k})), "mean_reward", "nll"]
        return [f"{name}/{figure}" for name in sets for figure in names]


def lower_is_better(metric: object) -> bool:
    """True for a figure, or a set's figure, that falls as a policy improves."""
    return isinstance(metric, str) and metric.rpartition("/")[2] == "nll"


class FigureSettings(Settings):
    """A figure to compare by, and whether the highest or the lowest is the best."""

    metric: str | None = None
    mode: Literal["max", "min"] = "max"

    @model_validator(mode="before")
    @classmethod
    def _by_figure(cls, tree: Any) -> Any:
        """Add the figure's own `mode` where none is given."""
        if isinstance(tree, Mapping) and lower_is_better(tree.get("metric")):
            return {"mode": "min", **tree}
        return tree


class BestSettings(FigureSettings):
    """The figure by which the evaluations of `eval.every` are compared, such as `test/pass@1`.

    `mode` is by default `min` for `nll` and `max` for all others.
    """

    metric: str


class CheckpointSettings(Settings):
    """A checkpoint every N steps; the newest `keep` remain on disk.

    With `best` the one with the best evaluation remains as well, and an evaluation better than all
    before it writes one; of equal ones it is the earliest. `adapter` is which of them `adapter/`
    and the final evaluation are of.
    """

    every: Annotated[PositiveInt, NO_RESULT] = 25
    keep: Annotated[PositiveInt, NO_RESULT] = 2
    best: Annotated[BestSettings | None, TRAINING] = None
    adapter: Annotated[Literal["last", "best"], TRAINING] = "last"

    @model_validator(mode="after")
    def _best_is_known(self) -> CheckpointSettings:
        if self.adapter == "best" and self.best is None:
            raise ValueError("adapter: must be last without checkpoint.best")
        return self


class EarlyStopSettings(Settings):
    """The end of training after `patience` evaluations in a row without an improvement.

    An evaluation is an improvement if the 95% paired bootstrap interval, over problems, of its
    difference to the last improvement (at first the base) lies above `min_delta`. The figure is
    `checkpoint.best.metric`, by default the headline.
    """

    patience: PositiveInt | None = None
    min_delta: NonNegativeFloat = 0.0


class GuardSettings(Settings):
    """Alarms on the metrics of training for a policy that collapses; null switches an alarm off.

    Means are over the last `window` steps that have the metric. `reward`: the mean of self samples
    is lower than its highest by this share; `entropy`: the mean is at least this many times its
    lowest; both by more than five standard errors, estimated from the differences between steps.
    `flat_groups`: at least this share of the groups, of 20 or more, teaches nothing, while the
    reward is nearer to its lowest than to its highest. `entropy_low`: at most so many nats.
    `grad_norm`: at least this many times the median. `kl` and `engine_gap`: at least so many nats
    per token, in the last measurement.

    `action` follows an alarm that was not there at the step before. `rollback` returns to the best
    checkpoint, or without `checkpoint.best` to the last one from before the window, and multiplies
    the learning rate by `lr_factor`, at most `rollbacks` times; the next alarm then ends training.
    The steps go on counting.
    """

    action: Literal["none", "warn", "stop", "rollback"] = "warn"
    window: PositiveInt = 5
    reward: Share | None = 0.25
    flat_groups: Share | None = 0.9
    entropy: Annotated[float, Field(gt=1)] | None = 2.5
    entropy_low: PositiveFloat | None = 0.005
    grad_norm: Annotated[float, Field(gt=1)] | None = 20.0
    kl: PositiveFloat | None = 1.0
    engine_gap: PositiveFloat | None = 0.1
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    rollbacks: PositiveInt = 2


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
    """Output in addition to metrics.jsonl.

    `tokens` records the log-probs and the loss's coefficient of each trained token of the first
    groups of a step, which takes passes over these groups, and at every `monitor.every`-th step the
    gradient of each source's rows, which takes another forward and backward pass of the step.
    `trackers` receive the numbers of each step, and as a table the responses of its first
    `completions` groups.
    """

    groups: bool = True
    tokens: bool = False
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    completions: NonNegativeInt = 2
