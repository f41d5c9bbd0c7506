"""Sections of a recipe about the course of training, its evaluation and its output."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gft_lite.objective.methods import METHODS
from gft_lite.recipe.base import Fraction, Settings, Share, matching, named_in
from gft_lite.recipe.effects import EVALUATION, NO_RESULT, TRAINING
from gft_lite.recipe.sections import DataSettings


class OptimSettings(Settings):
    """The optimiser, its schedule, and what it does about gradients that are no numbers."""

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
    """How long and in which portions: one step is one rollout of `problems_per_step` groups.

    `drop_zero_advantage` leaves out rows that add nothing to the gradient, before the forward.
    `memory` is what the memory plan may fill; `auto` is what the device has free.
    """

    steps: Annotated[PositiveInt, TRAINING] = 100
    problems_per_step: Annotated[PositiveInt, TRAINING] = 16
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
    """What may be spent, in place of `train.steps`, so that methods compare at equal cost.

    `problems` counts visits of a problem, `trajectories` responses, `tokens` the tokens of
    all responses of the groups; the step in which the amount is reached is the last.
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
    """One stage of a staged run: a method, what differs from the recipe, and the reference.

    `start` takes the policy at the start of the stage as the reference of its KL.
    """

    method: Annotated[str, named_in(METHODS)]
    reference: Literal["base", "start"] = "base"
    overrides: dict[str, Any] = {}


def stage_shorthand(value: Any) -> Any:
    """A stage may be written as the mere name of its method."""
    return {"method": value} if isinstance(value, str) else value


class MonitorSettings(Settings):
    """KL to the reference every n steps (0: never), on fixed held-out prompts."""

    every: Annotated[NonNegativeInt, TRAINING] = 10
    problems: Annotated[PositiveInt, EVALUATION] = 16


class EvalSettings(Settings):
    """Base and trained policy on named sets, the first of which is the headline."""

    sets: dict[str, DataSettings] = {}
    samples: PositiveInt = 8
    k: list[PositiveInt] = [1, 8]
    temperature: NonNegativeFloat = 0.5
    top_p: Share = 1.0
    max_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSettings:
        if self.k and max(self.k) > self.samples:
            raise ValueError(f"k: must be at most eval.samples, which is {self.samples}")
        return self


class CheckpointSettings(Settings):
    """A checkpoint every n steps; the newest `keep` stay on the disk."""

    every: PositiveInt = 25
    keep: PositiveInt = 2


class LogSettings(Settings):
    """What is written beside metrics.jsonl."""

    groups: bool = True
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
