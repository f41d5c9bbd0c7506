"""The plan of a referee: which recipes are run for which method, with equal budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from gft_lite.data.sources import open_source
from gft_lite.experiments.lab_bases import lab_seed
from gft_lite.experiments.referee_methods import (
    RATE,
    Contender,
    Settings,
    common_fields,
    find_contenders,
    names_of,
)
from gft_lite.experiments.sweep_config import MAX_RUNS
from gft_lite.experiments.tuning import check_correctness, geometric_rates, stages
from gft_lite.policy.model_files import check_model_files
from gft_lite.recipe.loader import Tree, find_recipe, merge, nested, read_tree
from gft_lite.recipe.method_parameters import complete_objective
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import DataSettings
from gft_lite.utils.errors import UserError, nearest, short_repr

Unit = Literal["trajectories", "tokens", "seconds"]
Part = Literal["tune", "main"]
UNITS: tuple[Unit, ...] = ("trajectories", "tokens", "seconds")
DIAL_TRIALS = 2  # Of each method, beside those of the rates.
STAGED_TRIALS = 3  # Of the last stage's rate of a method with stages.
# Of a tuning set that is not one of the recipe's: at most a fifth of the training data.
TUNE_NAME, TUNE_PROBLEMS, TUNE_SAMPLES = "tune", 64, 4
SEEDS = 5  # With 3, a difference must be three times as large to be found.


@dataclass(frozen=True, slots=True)
class RefereeOptions:
    """The options of `gft-lite referee`, as the user gives them.

    `bases` are models, by default that of the recipe; `budget` is in the unit of `equal`, by
    default that of the recipe. `against` is the method that the others are compared with, by
    default the first.
    """

    recipe: str
    methods: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    seeds: int = SEEDS
    bases: tuple[str, ...] = ()
    equal: Unit = "trajectories"
    budget: int | None = None
    tune: int = 3
    margin: float = 0.01
    against: str | None = None
    tune_set: str | None = None


@dataclass(frozen=True)
class RefereePlan:
    """A checked referee: the recipe of any method with any settings.

    `recipe` is the user's, `common` its fields that all methods share; `contenders` are all methods
    that are tuned, by name, `methods` those that are compared. `tune_set` are the data on which
    settings are chosen; `skip` problems of the training data are kept for it.
    """

    options: RefereeOptions
    recipe: Recipe
    common: Tree
    contenders: Mapping[str, Contender]
    methods: tuple[str, ...]
    against: str
    budget: float
    tune_set: DataSettings
    skip: int = 0
    sets: Mapping[str, DataSettings] = field(default_factory=dict)

    @cached_property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried with every method."""
        return geometric_rates(self.recipe.optim.rate, self.options.tune)

    @property
    def bases(self) -> tuple[str, ...]:
        """The models that the methods train; settings are chosen on the first."""
        return self.options.bases or (self.recipe.policy.model,)

    @property
    def responses_per_step(self) -> int:
        """Responses of a step, for all methods as near as their groups allow."""
        return self.recipe.train.problems_per_step * self.recipe.group.size

    @property
    def single(self) -> list[Contender]:
        """The methods without stages, whose settings are tuned first."""
        return [c for c in self.contenders.values() if not c.stages]

    @property
    def staged(self) -> list[Contender]:
        """The methods with stages, which have the tuned settings of each."""
        return [c for c in self.contenders.values() if c.stages]

    def tuning_runs(self, name: str) -> int:
        """Runs that choose settings of a method."""
        if len(self.rates) == 1:
            return 0
        return STAGED_TRIALS if self.contenders[name].stages else len(self.rates) + DIAL_TRIALS

    def main_runs(self, name: str) -> int:
        """Runs of a method that are compared."""
        return len(self.bases) * self.options.seeds if name in self.methods else 0

    @property
    def runs(self) -> dict[Part, int]:
        """All runs by part."""
        names = self.contenders
        return {"tune": sum(map(self.tuning_runs, names)), "main": sum(map(self.main_runs, names))}

    # --- settings ------------------------------------------------------------------------------

    def settings_at(self, name: str, rate: float) -> dict[str, Any]:
        """The settings of a method at a rate, with the value that the recipe gives to its dial."""
        contender = self.contenders[name]
        if contender.dial is None:
            return {RATE: rate}
        return {RATE: rate, contender.dial_field: self._objective(name)[contender.dial.parameter]}

    def dial_settings(self, name: str, value: float) -> dict[str, Any]:
        """The settings that a value of a method's dial means."""
        contender, objective = self.contenders[name], self._objective(name)
        assert contender.dial is not None
        own = objective[contender.dial.parameter]
        along = (each for each in contender.dial.along if objective[each] == own)
        return {contender.dial_field: value} | {f"objective.{each}": value for each in along}

    def dial_values(self, name: str) -> list[float]:
        """The values of a method's dial that are tried besides its own."""
        contender = self.contenders[name]
        if contender.dial is None:
            return []
        own = self.settings_at(name, 1.0)[contender.dial_field]
        return [value for value in contender.dial.values if value != own][:DIAL_TRIALS]

    def staged_settings(self, name: str, chosen: Mapping[str, Settings]) -> dict[str, Any]:
        """The settings of a method with stages: those that were chosen for each of them."""
        *earlier, last = self.contenders[name].stages
        settings = {
            f"stages.{number}.{field}": value
            for number, stage in enumerate(earlier)
            for field, value in chosen[stage].items()
        }
        return {**settings, **chosen[last]}

    # --- recipes -------------------------------------------------------------------------------

    def tree(self, name: str, settings: Settings, part: Part) -> Tree:
        """The fields of the recipe of a method's runs."""
        contender, common = self.contenders[name], merge(self.common, self._part_fields(part))
        if not contender.stages:
            layer = self._layer(contender, settings, self.budget)
            return merge(common, layer)
        count, layers = len(contender.stages), []
        for number, stage in enumerate(contender.stages):
            first = f"stages.{number}."
            own = {f.removeprefix(first): v for f, v in settings.items() if f.startswith(first)}
            if number == count - 1:
                own = {f: v for f, v in settings.items() if not f.startswith("stages.")}
            share = _share(self.budget, number, count)
            layers.append(self._layer(self.contenders[stage], own, share))
        whole = {"budget": {self.options.equal: self.budget}, "stages": stages(layers)}
        return merge(merge(common, layers[-1]), whole)

    def stem(self, name: str, settings: Settings) -> str:
        """The name of a recipe file, which tells settings apart."""
        values = (f"_{field.rpartition('.')[2]}{value:g}" for field, value in settings.items())
        return self.contenders[name].label + "".join(values)

    def problems_per_step(self, name: str) -> int:
        """Problems of a step of a single method, so that its responses are those of all."""
        size = self._recipe(self.contenders[name].layer).group.size
        return max(1, round(self.responses_per_step / size))

    def trajectories(self, name: str) -> int | None:
        """Responses of a run of a method; None where another unit is equal."""
        if self.options.equal != "trajectories":
            return None
        recipe = Recipe.from_tree(self.tree(name, self.example_settings(name), "main"))
        parts = [recipe.stage(i) for i in range(len(recipe.stages))] or [recipe]
        return sum((r.steps or 0) * r.train.problems_per_step * r.group.size for r in parts)

    def example_settings(self, name: str) -> dict[str, Any]:
        """Settings of a method before any are chosen."""
        contender, rate = self.contenders[name], self.recipe.optim.rate
        if not contender.stages:
            return self.settings_at(name, rate)
        return self.staged_settings(name, {s: self.settings_at(s, rate) for s in contender.stages})

    def _layer(self, contender: Contender, settings: Settings, budget: float) -> Tree:
        layer = contender.layer
        for name, value in settings.items():
            layer = merge(layer, nested(name, value))
        per_step = {"problems_per_step": self.problems_per_step(contender.name)}
        return merge(layer, {"train": per_step, "budget": {self.options.equal: budget}})

    def _part_fields(self, part: Part) -> Tree:
        """What differs between tuning and the compared runs: the seed, and what is evaluated."""
        evaluation = self.recipe.eval.model_dump(exclude_defaults=True)
        tree: Tree = {"seed": self.recipe.seed + 1, "eval": evaluation}
        tree["eval"]["sets"] = {name: each.model_dump() for name, each in self.sets.items()}
        if part == "tune":
            samples = min(TUNE_SAMPLES, self.recipe.eval.samples)
            sets = {TUNE_NAME: self.tune_set.model_dump()}
            tree["seed"] = self.recipe.seed
            tree["eval"] |= {"samples": samples, "k": [1], "sets": sets, "every": 0}
            tree["monitor"] = {"every": 0}
            tree["checkpoint"] = {"best": None, "adapter": "last"}  # By sets of the comparison.
        if self.skip:
            tree["data"] = {"skip": self.skip}
        return tree

    def _objective(self, name: str) -> dict[str, Any]:
        """The objective of a method by the recipe, with its defaults."""
        recipe = complete_objective(self._recipe(self.contenders[name].layer))
        return recipe.objective.model_dump()

    def _recipe(self, layer: Tree) -> Recipe:
        return Recipe.from_tree(merge(merge(self.common, self._part_fields("main")), layer))


def _share(budget: float, number: int, count: int) -> float:
    """The budget of a stage; all of them add up to the whole."""
    if isinstance(budget, float):
        return budget / count
    return budget * (number + 1) // count - budget * number // count


# --- checks ----------------------------------------------------------------------------------


def make_plan(options: RefereeOptions) -> RefereePlan:
    """Check the options and the recipe of every method; dotted methods are imported.

    Raises: UserError with every error found.
    """
    _check_numbers(options)
    recipe = Recipe.load(options.recipe, options.overrides)
    for base in options.bases:
        if lab_seed(base) is None:
            policy = recipe.policy.model_copy(update={"model": base})
            check_model_files(policy, needs_weights=False)
    check_correctness(recipe)
    _check_course(recipe)
    tree = read_tree(find_recipe(options.recipe), options.overrides)[0]
    contenders = find_contenders(options.methods, recipe, tree)
    methods = names_of(options.methods)
    tune_set, skip = _tuning_data(recipe, options.tune_set)
    plan = RefereePlan(
        options=options,
        recipe=recipe,
        common=common_fields(tree),
        contenders=contenders,
        methods=methods,
        against=_against(options.against, methods),
        budget=_budget(options, recipe),
        tune_set=tune_set,
        skip=skip,
        sets=_compared_sets(recipe, options.tune_set, tune_set),
    )
    _check_recipes(plan)
    return plan


def _check_numbers(options: RefereeOptions) -> None:
    problems = [
        f"--{name}: must be at least 1, got {value}."
        for name, value in (("seeds", options.seeds), ("tune", options.tune),
                            ("budget", 1 if options.budget is None else options.budget))
        if value < 1
    ]  # fmt: skip
    if not 0 < options.margin < 1:
        rule = "--margin: must be between 0 and 1, the smallest difference worth having"
        problems.append(f"{rule}, got {options.margin:g}. Such as 0.01.")
    if options.equal not in UNITS:
        rule = f"must be one of {', '.join(UNITS)}"
        problems.append(f"--equal: {rule}, got {short_repr(options.equal)}.")
    runs = len(options.methods) * options.seeds * max(1, len(options.bases))
    if options.seeds >= 1 and runs > MAX_RUNS:
        rule = f"--seeds: must give at most {MAX_RUNS:,} runs of the methods"
        problems.append(f"{rule}, got {options.seeds:,}, which are {runs:,}.")
    if len(set(options.bases)) < len(options.bases):
        problems.append(f"--bases: must not name a model twice, got {','.join(options.bases)}.")
    if problems:
        raise UserError(problems)


def _check_course(recipe: Recipe) -> None:
    """Raises: UserError for what ends or repeats training, which would make budgets unequal."""
    equal, problems = "as methods are compared at equal budgets", []
    if recipe.early_stop.patience:
        rule = f"early_stop.patience: must be null, {equal}"
        problems.append(f"{rule}, got {recipe.early_stop.patience}. Leave it out.")
    if recipe.guard.action in ("stop", "rollback"):
        rule = f"guard.action: must be none or warn, {equal}"
        problems.append(f"{rule}, got {recipe.guard.action}. Leave it out.")
    if problems:
        raise UserError(problems)


def _against(name: str | None, methods: Sequence[str]) -> str:
    if name is None or name in methods:
        return name or methods[0]
    close = nearest(name, methods)
    hint = f" Did you mean {close}?" if close else ""
    rule = f"--against: must be one of --methods, {', '.join(methods)}"
    raise UserError([f"{rule}, got {short_repr(name)}.{hint}"])


def _budget(options: RefereeOptions, recipe: Recipe) -> float:
    """The budget of a run. Raises: UserError if neither the recipe nor the options have one."""
    if options.budget is not None:
        return options.budget
    written: float | None = getattr(recipe.budget, options.equal)
    if written is not None:
        return written
    if options.equal != "trajectories" or recipe.steps is None:
        rule = f"--budget: must be the {options.equal} of a run, which the recipe does not have"
        raise UserError([f"{rule}, got nothing. Such as --budget 100000."])
    return recipe.steps * recipe.train.problems_per_step * recipe.group.size


def _tuning_data(recipe: Recipe, name: str | None) -> tuple[DataSettings, int]:
    """The data on which settings are chosen, and how many training problems are kept for them."""
    if name is not None:
        if name not in recipe.eval.sets:
            known = ", ".join(recipe.eval.sets) or "none"
            rule = f"--tune-set: must be one of the recipe's eval.sets, {known}"
            raise UserError([f"{rule}, got {short_repr(name)}."])
        return recipe.eval.sets[name], 0
    data = recipe.data.model_dump(include=set(DataSettings.model_fields))
    if recipe.data.source == "lab":
        return DataSettings(**data | {"split": "tune", "problems": TUNE_PROBLEMS}), 0
    rows = sum(part.count for part in open_source(recipe.data))
    count = max(1, min(TUNE_PROBLEMS, (rows - recipe.data.skip) // 5))
    return DataSettings(**data | {"problems": count}), recipe.data.skip + count


def _compared_sets(
    recipe: Recipe, name: str | None, tune_set: DataSettings
) -> dict[str, DataSettings]:
    """The sets of the comparison. Raises: UserError if there are none, or one is for tuning."""
    sets = {n: each for n, each in recipe.eval.sets.items() if n != name}
    if not sets:
        but = f" besides {name}, which --tune-set names" if name else ""
        rule = f"eval.sets: must have a set of problems to compare methods on{but}"
        raise UserError([f"{rule}, got none. Add one, such as test."])
    same = [n for n, each in sets.items() if _rows(each) == _rows(tune_set)]
    if same:
        rule = f"eval.sets.{same[0]}: must have other problems than those settings are chosen on"
        raise UserError([f"{rule}, got the same. Name another set as --tune-set."])
    return sets


def _rows(data: DataSettings) -> dict[str, Any]:
    return data.model_dump(include={"source", "file", "config", "split", "skip"})


def _check_recipes(plan: RefereePlan) -> None:
    """Raises: UserError for every method whose recipe has an error, with the method's name."""
    problems: list[str] = []
    for name in plan.contenders:
        try:
            recipe = Recipe.from_tree(plan.tree(name, plan.example_settings(name), "main"))
            for number in range(len(recipe.stages)):
                recipe.stage(number)
            complete_objective(recipe)
            for value in plan.dial_values(name):
                settings = plan.example_settings(name) | plan.dial_settings(name, value)
                complete_objective(Recipe.from_tree(plan.tree(name, settings, "tune")))
        except UserError as error:
            problems += [f"--methods: {name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
