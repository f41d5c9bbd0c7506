"""Sections of a recipe about training: optimiser, steps, budget, teacher and stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gft_lite.objective.methods import METHODS
from gft_lite.recipe.base import Fraction, Settings, at_most, matching, named_in
from gft_lite.recipe.effects import NO_RESULT, TRAINING
from gft_lite.utils.errors import RecipeError


class OptimSettings(Settings):
    """The optimiser and its schedule, which follows the share of the budget that is spent."""

    name: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"
    """Optimiser: AdamW, or its paged 8-bit form (arXiv 2305.14314), which takes less memory and
    needs CUDA; `auto`: the paged one on a GPU."""
    lr: Literal["auto"] | PositiveFloat = 1e-4
    """Highest learning rate. By default the method's: 2e-5 for GFT, GRPO and mixed methods, 1e-4
    for SFT and its variants. `auto`: a rule by the model's width, the adapter's scale and the
    method. `gft-lite train --lr-range` measures which rates work."""
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """Learning rate of the adapter's B, and of DoRA's norms, over that of its A, which is `lr`
    (LoRA+, arXiv 2402.12354)."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after the warm-up: constant, or a decay to 0."""
    warmup: Fraction = 0.05
    """Share of the budget in which the learning rate rises from 0 to `lr`."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of the adapter's weights per unit of learning rate, as in AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of AdamW's means of the gradient and of its square."""
    clip_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to it."""
    max_bad_steps: PositiveInt = 3
    """A step with a non-finite loss or gradient is skipped; after this many in a row training
    fails."""

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
    """The number and size of steps; a step is a rollout with its updates."""

    steps: Annotated[PositiveInt, TRAINING] = 100
    """Number of steps; without effect if a budget is set."""
    problems_per_step: Annotated[PositiveInt, at_most(1_000_000), TRAINING] = 16
    """Number of problems of a step, each with a group: the batch size in groups."""
    updates_per_rollout: Annotated[PositiveInt, TRAINING] = 1
    """Number of updates that share a rollout, each on a part of its groups; 8 by default with
    `psft`. More save rollouts and train on older samples."""
    micro_batch_tokens: Annotated[Literal["auto"] | PositiveInt, NO_RESULT] = 8192
    """Most tokens, with prompts and padding, of a forward pass; a longer row has one of its own.
    Halved where memory runs out. `auto`: the memory plan decides."""
    memory: Annotated[
        str,
        matching(r"auto|(?=.*[1-9])\d+(\.\d+)? ?[GM]i?B", "must be auto or a size such as 8GiB"),
        NO_RESULT,
    ] = "auto"
    """Limit of the memory plan, such as 8GiB, where other processes need the rest; `auto`: what is
    free on the device."""
    drop_zero_advantage: Annotated[bool, TRAINING] = True
    """Leave out rows that add nothing to the gradient, as their advantage is 0, which saves time.
    """

    @model_validator(mode="after")
    def _updates_fit(self) -> TrainSettings:
        if self.updates_per_rollout > self.problems_per_step:
            rule = f"must be at most train.problems_per_step, which is {self.problems_per_step}"
            raise ValueError(f"updates_per_rollout: {rule}")
        return self


class BudgetSettings(Settings):
    """A limit in place of `train.steps`, to compare methods at equal cost; one at most is set.

    The step that reaches the limit is the last.
    """

    problems: PositiveInt | None = None
    """Number of visits of problems; null: no limit."""
    trajectories: PositiveInt | None = None
    """Number of responses, demonstrations included; null: no limit."""
    tokens: PositiveInt | None = None
    """Number of tokens of all responses in the groups; null: no limit."""
    seconds: PositiveFloat | None = None
    """Seconds of rollouts, rewards, updates and syncs, not of evaluations; null: no limit."""

    @model_validator(mode="after")
    def _one_at_most(self) -> BudgetSettings:
        known = dict(self)
        given = [name for name, amount in known.items() if amount is not None]
        if len(given) > 1:
            raise ValueError(f"must name one of {', '.join(known)}, not {given}")
        return self


class StageSettings(Settings):
    """A stage of a staged run, which continues the adapter of the stage before it."""

    method: Annotated[str, named_in(METHODS)]
    """Method of the stage. Another than the recipe's begins with its own `group`, `objective`,
    learning rate and updates per rollout, and its own `teacher` where the recipe sets none."""
    reference: Literal["base", "start"] = "base"
    """What the KL of the stage is measured to: the base, or the policy at the start of the stage.
    In the first stage `policy.reference` decides."""
    overrides: dict[str, Any] = {}
    """Fields in which the stage differs from the recipe, as a recipe has them."""


def _stage_shorthand(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


# Of a stage, which may be given as the name of its method alone.
STAGE_SHORTHAND = BeforeValidator(_stage_shorthand, json_schema_input_type=str | StageSettings)


class TeacherSettings(Settings):
    """The model whose log-probs on the policy's own samples methods `sdft` and `opd` learn from."""

    model: Annotated[str, Field(min_length=1)] = "base"
    """`base`, the policy without adapter; `average`, a moving average of the adapter; the folder of
    an adapter of the same base, rank and alpha; or a model with the same tokenizer, loaded as the
    policy is and not counted by the memory plan. The default of `sdft` is `average`; `opd` needs
    an adapter or another model."""
    decay: Fraction = 0.95
    """With `model: average`: after each update, average = decay * average + (1 - decay) * adapter.
    """
    template: str = (
        "{problem}\n\nHere is an example of a good answer:\n\n{demonstration}\n\n"
        "Now write your own answer."
    )
    """Problem as the teacher of `sdft` gets it, in the same `data.prompt` as the policy;
    `{problem}` and `{demonstration}` stand for the problem and its first expert demonstration."""

    @model_validator(mode="after")
    def _template_is_complete(self) -> TeacherSettings:
        for name in ("{problem}", "{demonstration}"):
            if name not in self.template:
                raise ValueError(f"template: must contain {name}")
        return self
