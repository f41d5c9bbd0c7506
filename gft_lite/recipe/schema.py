"""The schema of a whole recipe, with the rules that concern several sections.

No large library is imported, so that `--help`, `--dry-run` and recipe errors take no time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from gft_lite.objective.methods import METHODS
from gft_lite.recipe.base import Settings, matching, named_in, read_settings
from gft_lite.recipe.course_sections import (
    CheckpointSettings,
    EarlyStopSettings,
    EvalSettings,
    GuardSettings,
    LogSettings,
    MonitorSettings,
    course_rules,
)
from gft_lite.recipe.data_sections import PromptSettings, TrainingDataSettings
from gft_lite.recipe.effects import (
    EVERYTHING,
    NO_RESULT,
    TRAINING,
    differences,
    leaves,
)
from gft_lite.recipe.loader import Dumper, find_recipe, merge, without_fields
from gft_lite.recipe.objective_schema import check_objective
from gft_lite.recipe.objective_sections import ObjectiveSettings, RewardSettings
from gft_lite.recipe.policy_section import PolicySettings
from gft_lite.recipe.rollout_sections import GroupSettings, RolloutSettings
from gft_lite.recipe.training_sections import (
    STAGE_SHORTHAND,
    BudgetSettings,
    OptimSettings,
    StageSettings,
    TeacherSettings,
    TrainSettings,
)
from gft_lite.recipe.validation_errors import Places, Problem
from gft_lite.utils.errors import RecipeError, short_repr

# Fields of `policy` that no stage may change, as the adapter is that of the stage before.
_CONTINUED = {"model", "revision", "adapter", "reference", "lora"}
# Fields that belong to a method: where another one takes its place, it has its own defaults.
METHOD_FIELDS = ("group", "objective", "optim.lr", "train.updates_per_rollout")


class Recipe(Settings):
    """The settings of an experiment; `Recipe.load` reads them from YAML."""

    name: Annotated[
        str,
        matching(r"\w[\w.-]*", "must be letters, digits, `_`, `-` and `.`, to name a folder"),
        TRAINING,
    ] = "run"
    """Name of the run: of its folder below `runs/`, which gets a number if it is taken, and of the
    project in trackers."""
    seed: Annotated[int, Field(ge=0, lt=2**31), EVERYTHING] = 0
    """Seed of the adapter's start, the order of problems, sampling and dropout; repeat a run with
    others to see how much results vary."""
    method: Annotated[str, named_in(METHODS), TRAINING] = "gft"
    """What is trained on and by which loss: a name that `gft-lite methods` lists, or the dotted
    path of your own `Method`."""
    policy: PolicySettings = PolicySettings()
    """The model, its quantisation, device and adapter."""
    data: TrainingDataSettings = TrainingDataSettings()
    """The problems with their answers and demonstrations, and the prompt."""
    group: GroupSettings = GroupSettings()
    """How many demonstrations and samples a problem has."""
    objective: Annotated[ObjectiveSettings, Field(validate_default=True), TRAINING] = (
        ObjectiveSettings()
    )
    """Parameters of the loss."""
    reward: RewardSettings = Field(default_factory=RewardSettings)
    """How responses are graded."""
    rollout: RolloutSettings = RolloutSettings()
    """How responses are sampled."""
    optim: Annotated[OptimSettings, TRAINING] = OptimSettings()
    """The learning rate, its schedule and the optimiser."""
    train: TrainSettings = TrainSettings()
    """How long the run is, and how large its steps and micro-batches are."""
    budget: Annotated[BudgetSettings, TRAINING] = BudgetSettings()
    """A limit in problems, responses, tokens or seconds instead of steps."""
    teacher: Annotated[TeacherSettings, TRAINING] = TeacherSettings()
    """The model that methods `sdft` and `opd` learn from."""
    stages: Annotated[list[Annotated[StageSettings, STAGE_SHORTHAND]], TRAINING] = []
    """Methods to train with one after the other, each a name or a mapping as in `stages[]`. Empty:
    one stage with `method`."""
    monitor: MonitorSettings = MonitorSettings()
    """How often the KL to the reference is measured."""
    eval: EvalSettings = EvalSettings()
    """What base and trained policy are evaluated on, and when."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """How often the state is saved, and which policy is the result."""
    early_stop: Annotated[EarlyStopSettings, TRAINING] = EarlyStopSettings()
    """When training ends for lack of improvement."""
    guard: Annotated[GuardSettings, TRAINING] = GuardSettings()
    """Alarms for a policy that collapses, and what follows them."""
    log: Annotated[LogSettings, NO_RESULT] = LogSettings()
    """What is written besides the metrics."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, tree: Any) -> Any:
        """Add the method's defaults, and the training prompt to evaluation sets without one."""
        if not isinstance(tree, Mapping):
            return tree
        known = METHODS.get(str(tree.get("method", "gft")))
        tree = merge(known.defaults, tree) if known else tree
        data, evaluation = tree.get("data"), tree.get("eval")
        sets = evaluation.get("sets") if isinstance(evaluation, Mapping) else None
        if not (isinstance(data, Mapping) and "prompt" in data and isinstance(sets, Mapping)):
            return tree
        try:
            PromptSettings.model_validate(data["prompt"])
        except ValidationError:  # Reported for data.prompt, not again for every set.
            return tree
        prompted = {
            name: {"prompt": data["prompt"], **each} if isinstance(each, Mapping) else each
            for name, each in sets.items()
        }
        return merge(tree, {"eval": {"sets": prompted}})

    @field_validator("objective", mode="wrap")
    @classmethod
    def _parameters_fit_method(
        cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> ObjectiveSettings:
        """Check a built-in method's parameters; a dotted one's code is not imported here."""
        method = info.data.get("method")  # Missing if its own value is wrong.
        return check_objective(method, value) if method in METHODS else handler(value)

    @model_validator(mode="after")
    def _group_fits_method(self) -> Recipe:
        method = METHODS.get(self.method)
        if method is None:  # The sources of a dotted method are not known before its import.
            return self
        why = f"with method {self.method}, which trains on {' and '.join(method.sources)} rows"
        unused = {"expert", "teacher", "self"} - set(method.sources)
        rules = [f"group.{s}: must be 0 {why}" for s in sorted(unused) if getattr(self.group, s)]
        if "self" in unused and self.group.shortfall == "self":
            rules.append(f"group.shortfall: must be repeat or drop {why}")
        if rules:
            raise ValueError("\n".join(rules))
        return self

    @model_validator(mode="after")
    def _presampled_groups_fit(self) -> Recipe:
        if self.group.offline is None:
            return self
        why = "with group.offline, whose groups are sampled before training"
        method, rules = METHODS.get(self.method), []
        if self.rollout.resample:
            rules.append(f"rollout.resample: must be 0 {why}")
        if self.stages:
            rules.append(f"stages: must be empty {why}, by another policy than a stage's")
        if method and method.on_policy:
            rule = f"must not need samples of the current policy, as {self.method} does,"
            rules.append(f"method: {rule} {why}")
        if rules:
            raise ValueError("\n".join(rules))
        return self

    @model_validator(mode="after")
    def _teacher_can_differ(self) -> Recipe:
        method = METHODS.get(self.method)
        if method is None or "teacher_logprobs" not in method.needs:
            return self
        if not method.teacher_sees_demonstration and self.teacher.model in ("base", "average"):
            rule = "must be another model or an adapter, as the policy starts as base and average,"
            raise ValueError(f"teacher.model: {rule} with method {self.method}")
        return self

    @model_validator(mode="after")
    def _groups_can_differ(self) -> Recipe:
        """Reject groups from which training can learn nothing."""
        group, rollout, rules = self.group, self.rollout, []
        samples = group.size if group.shortfall == "self" else group.self
        if samples > 1 and rollout.is_greedy:
            rule = "top_p: must be at least 0.01"
            rule = "top_k: must not be 1" if rollout.top_k == 1 else rule
            rule = rule if rollout.temperature else "temperature: must be above 0"
            of = f"group.self {group.self}" if group.self > 1 else "group.shortfall self"
            rules.append(f"rollout.{rule} with {of}, or all self samples of a group are the same")
        method = METHODS.get(self.method)
        if method and method.group_advantages and not any(f.weight for f in self.reward.functions):
            rules.append(f"reward.functions: must have a weight other than 0 with {self.method}")
        if rules:
            raise ValueError("\n".join(rules))
        return self

    @model_validator(mode="after")
    def _adapter_can_be_trained(self) -> Recipe:
        lora, rules = self.policy.lora, []
        if lora.use_dora and self.rollout.engine != "transformers" and not self.group.offline:
            rule = "must be false unless rollout.engine is transformers, as vLLM can't serve DoRA"
            rules.append(f"policy.lora.use_dora: {rule}")
        if lora.init != "default" and self.optim.weight_decay:
            rule = f"must be 0 with policy.lora.init {lora.init}, whose factors are the base's own"
            rules.append(f"optim.weight_decay: {rule}")
        if self.optim.lr == "auto":
            why = {"stages, each with a rate of its own": bool(self.stages),
                   f"policy.lora.init {lora.init}": lora.init != "default",
                   "optim.lora_plus_ratio": self.optim.lora_plus_ratio != 1}  # fmt: skip
            rules += [f"optim.lr: must be a number with {it}" for it, so in why.items() if so]
        if rules:
            raise ValueError("\n".join(rules))
        return self

    @model_validator(mode="after")
    def _rewards_have_answers(self) -> Recipe:
        method = METHODS.get(self.method)
        trained = {} if method and not method.group_advantages else {"data": self.data}
        # A set with demonstrations is evaluated by their likelihood.
        sets = trained | {f"eval.sets.{name}": data for name, data in self.eval.sets.items()
                          if not data.columns.may_demonstrate}  # fmt: skip
        rules = [f"{field}.columns.answer: {rule}" for field, data in sets.items()
                 if (rule := self.reward.answer_rule(data.columns))]  # fmt: skip
        if rules:
            raise ValueError("\n".join(rules))
        return self

    @model_validator(mode="after")
    def _course_fits(self) -> Recipe:
        course = self.eval, self.checkpoint, self.early_stop, self.guard
        if rules := course_rules(*course, self.steps, self.eval_names):
            raise ValueError("\n".join(rules))
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file, what it extends, and `key=value` overrides.

        Raises: RecipeError with every error found.
        """
        recipe, places = read_settings(cls, find_recipe(path), overrides)
        problems = []
        for number in range(len(recipe.stages)):
            below = ("stages", number, "overrides")
            inside = {at[3:]: place for at, place in places.items() if at[:3] == below}
            try:
                recipe.stage(number, inside)
            except RecipeError as error:
                problems += [f"{text} (stage {number + 1})" for text in error.problems]
        if problems:
            raise RecipeError(problems)
        return recipe

    def stage(self, number: int, places: Places | None = None) -> Recipe:
        """The recipe of a stage (from 0), without stages; `places` are those of its overrides.

        Raises: RecipeError with every error found.
        """
        overrides, places = self.stages[number].overrides, places or {}
        rule = "must be written in the stage, not in its overrides"
        misplaced = [Problem((name,), rule, short_repr(overrides[name])).text(places)
                     for name in ("method", "stages") if name in overrides]  # fmt: skip
        if misplaced:
            raise RecipeError(misplaced)
        stage = Recipe.from_tree(self._stage_tree(number), places)
        old, new = (leaves(r.model_dump(include={"policy": _CONTINUED})) for r in (self, stage))
        why = "in a stage, which continues the adapter of the stage before it"
        changed = [
            Problem(
                tuple(name.split(".")),
                f"must be that of the recipe, {short_repr(value)}, {why}",
                short_repr(other),
            ).text(places)
            for name, value, other in differences(dict(old), dict(new))
        ]
        if stage.optim.lr == "auto":
            rule = "must be a number in a stage"
            changed.append(Problem(("optim", "lr"), rule, "auto").text(places))
        if changed:
            raise RecipeError(changed)
        return stage

    def _stage_tree(self, number: int) -> dict[str, Any]:
        stage = self.stages[number]
        tree = self.model_dump(exclude={"stages"})
        if stage.method != self.method:
            own = METHODS[self.method].defaults if self.method in METHODS else {}
            chosen = self.teacher != TeacherSettings.model_validate(own.get("teacher", {}))
            # Perhaps defaults of the other method.
            tree = without_fields(tree, METHOD_FIELDS if chosen else (*METHOD_FIELDS, "teacher"))
        return merge(merge(tree, {"method": stage.method}), stage.overrides)

    def with_needed_engine(self) -> Recipe:
        """The recipe with the transformers engine if only evaluation samples (group.offline)."""
        if self.group.offline is None:
            return self
        rollout = self.rollout.model_copy(update={"engine": "transformers"})
        return self.model_copy(update={"rollout": rollout})

    @property
    def eval_names(self) -> list[str]:
        """The names of the evaluation sets: those of the recipe, or that of the held-out problems.

        Held-out problems without answers and demonstrations are not evaluated.
        """
        return [*self.eval.sets] or ["held_out"] * bool(self.data.holdout)

    @property
    def steps(self) -> int | None:
        """The number of steps; None under a budget of tokens or seconds."""
        per_step, budget = self.train.problems_per_step, self.budget
        if budget.tokens or budget.seconds:
            return None
        if budget.trajectories:
            per_step *= self.group.size
        amount = budget.problems or budget.trajectories
        return math.ceil(amount / per_step) if amount else self.train.steps

    def to_yaml(self) -> str:
        """The complete recipe with every default, as YAML that `load` reads back."""
        tree = self.model_dump()
        return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
