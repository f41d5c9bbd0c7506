"""Sections of a recipe about the course of training, its evaluation and its output."""

from __future__ import annotations

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


class OptimSettings(Settings):
    """The optimiser and its schedule.

    After `max_bad_steps` steps in a row with a non-finite loss or gradient, training fails.
    """

    name: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"
    lr: PositiveFloat = 1e-4
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: Fraction = 0.05
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip_norm: PositiveFloat = 1.0
    max_bad_steps: PositiveInt = 3

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
    responses of the groups. The step that reaches the limit is the last.
    """

    problems: PositiveInt | None = None
    trajectories: PositiveInt | None = None
    tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_at_most(self) -> BudgetSettings:
        given = [name for name, amount in self if amount is not None]
        if len(given) > 1:
            raise ValueError(f"must name one of problems, trajectories and tokens, not {given}")
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
    """The evaluation of base and trained policy on named sets; the first is the headline."""

    sets: dict[str, DataSettings] = {}
    samples: Annotated[PositiveInt, at_most(100_000)] = 8
    k: list[PositiveInt] = [1, 8]
    temperature: Temperature = 0.5
    top_p: Share = 1.0
    max_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSettings:
        if self.k and max(self.k) > self.samples:
            raise ValueError(f"k: must be at most eval.samples, which is {self.samples}")
        return self


class CheckpointSettings(Settings):
    """A checkpoint every N steps; the newest `keep` remain on disk."""

    every: PositiveInt = 25
    keep: PositiveInt = 2


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
