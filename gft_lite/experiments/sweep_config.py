"""Schema of a sweep: a recipe and a grid of its fields, expanded to trials with checked recipes."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import yaml
from pydantic import Field, PositiveInt, model_validator

from gft_lite.recipe.base import Settings
from gft_lite.recipe.course_sections import FigureSettings
from gft_lite.recipe.loader import (
    COMMAND_LINE,
    Dumper,
    find_recipe,
    gather,
    merge,
    nested,
    read_tree,
)
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import GroupSettings
from gft_lite.recipe.validation_errors import Places
from gft_lite.utils.errors import RecipeError, nearest, short_repr

MAX_RUNS = 1_000  # Of one sweep.
MAX_POINTS = 1_000_000  # Of a grid from which `random` points are drawn.
_ON_COMMAND_LINE = ("overrides", "grid", "random", "random_seed", "seeds", "search", "budget_hours")
# Limits of a trial's folder name, in characters.
_MAX_VALUE, _MAX_NAME = 40, 200
_DRAWS_PER_POINT = 100  # Before a range is taken to have too few distinct values.


class Range(Settings):
    """Values between two bounds, drawn uniformly on a linear or on a logarithmic scale."""

    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_scale(self) -> Range:
        if (self.uniform is None) == (self.log is None):
            raise ValueError("must have one of uniform and log")
        if self.log and min(self.log) <= 0:
            raise ValueError("log: must have bounds above 0")
        if self.uniform and not math.isfinite(self.uniform[1] - self.uniform[0]):
            raise ValueError("uniform: must have bounds whose difference is finite")
        return self

    def draw(self, rng: Random) -> float:
        """A random value, rounded to four significant digits."""
        if self.log:
            return rounded(math.exp(rng.uniform(*map(math.log, self.log))))
        return rounded(rng.uniform(*self.bounds))

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds in the order given."""
        return self.log or self.uniform or (0, 0)


class SearchSettings(FigureSettings):
    """`trials` points that Optuna's TPE sampler proposes, seeded by `random_seed`.

    `metric` is a figure of the final evaluation such as `test/pass@1`, by default the headline: the
    lowest `nll` of a set without answers. By `prune`, asynchronous successive halving (arXiv
    1810.05934) compares the evaluations of `eval.every`: after the 1st, 3rd, 9th, ... of a run, it
    goes on if it is among the best third of the runs that came this far, and is otherwise stopped
    after its current step.
    """

    trials: PositiveInt
    prune: bool = False


def rounded(value: float) -> float:
    """A value of a range with four significant digits."""
    return float(f"{value:.4g}")


Values = Annotated[list[Any], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep: the name of its folder, its values of the grid, and its recipe."""

    name: str
    settings: dict[str, Any]
    recipe: Recipe


class Sweep(Settings):
    """A recipe, changed by `overrides`, at every point of a grid, with several seeds.

    The grid can have every field of the recipe, such as `objective.tau`. Values of `group` can be
    ratios of demonstrations to self samples, such as `6:2`; values of `recipe` are recipe files.
    `random` points are drawn from the grid with `random_seed`; a larger `random` adds points to
    those of a smaller one; `search` has them proposed by the results of the points before. The
    `seeds` count up from the seed of the recipe. `budget_hours` of all runs, one after another,
    shorten `train.steps` rather than the grid.
    """

    name: str = "sweep"
    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, Values | Range] = Field(default_factory=dict)
    random: PositiveInt | None = None
    random_seed: int = 0
    seeds: PositiveInt = 1
    search: SearchSettings | None = None
    budget_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        rules = []
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            rules.append("name: must be letters, digits, `_`, `-` and `.`, to name a folder")
        if "seed" in self.grid:
            rules.append("grid: must not have the field seed, which `seeds` sets")
        if not all(isinstance(file, str) for file in self._files[1:]):
            rules.append("grid: must have a list of files as `recipe`")
        for field in self.grid:
            rules += [f"grid: must not have both {field} and {other}, which is a part of it"
                      for other in self.grid if other.startswith(f"{field}.")]  # fmt: skip
        rules += self._wrong_search() if self.search else self._wrong_counts()
        if rules:
            raise ValueError("\n".join(rules))
        return self

    def _wrong_counts(self) -> Iterator[str]:
        """Rules of `random` and of the number of runs, checked before any run is built."""
        ranges = [field for field, values in self.grid.items() if isinstance(values, Range)]
        points = math.prod(len(v) for v in self.grid.values() if isinstance(v, list))
        if ranges and not self.random:
            yield f"random: must be the number of points to draw, because {ranges[0]} has a range"
        elif not ranges and self.random and self.random > points:
            yield f"random: must be at most {points:,}, the points of the grid"
        elif not ranges and self.random and points > MAX_POINTS:
            yield f"grid: must have at most {MAX_POINTS:,} points to draw from, not {points:,}"
        drawn = self.random or points
        if drawn * self.seeds > MAX_RUNS:
            field = "seeds" if self.seeds > 1 else "random" if self.random else "grid"
            runs = f"{drawn * self.seeds:,} (points {drawn:,}, seeds {self.seeds:,})"
            yield f"{field}: must give at most {MAX_RUNS:,} runs, not {runs}"

    def _wrong_search(self) -> Iterator[str]:
        """Rules of `search`, checked before any run is built."""
        trials = self.search.trials if self.search else 0
        if self.random:
            yield "random: must not be given with search, which proposes the points"
        if self.seeds > 1:
            yield "seeds: must be 1 with search; run its best point again with more seeds"
        if not self.grid:
            yield "grid: must have the fields to search"
        elif self.points is not None and trials > self.points:
            yield f"search.trials: must be at most {self.points:,}, the points of the grid"
        if trials > MAX_RUNS:
            yield f"search.trials: must be at most {MAX_RUNS:,}"
        if self.budget_hours is not None:
            yield "budget_hours: must not be given with search, whose --prune shortens runs"

    @property
    def points(self) -> int | None:
        """The number of points of the grid, None with a range."""
        if any(isinstance(values, Range) for values in self.grid.values()):
            return None
        return math.prod(len(v) for v in self.grid.values() if isinstance(v, list))

    @property
    def _files(self) -> list[Any]:
        """The recipe file and those of the grid."""
        values = self.grid.get("recipe", [])
        return [self.recipe, *(values if isinstance(values, list) else [values])]

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
        """Load a sweep file, or a recipe file with the fields of the sweep in `overrides`.

        Overrides change fields of the sweep: `seeds=3`, `overrides.optim.lr=1e-3`, `grid={...}`.
        Raises: RecipeError with every error of the sweep and of its recipes.
        """
        file = find_recipe(path)
        tree, places, problems = gather(file, overrides)
        if problems:
            raise RecipeError(problems)
        own = gather(file)[0]
        if {"recipe", "grid"} & set(own):
            return cls.from_tree(tree, places, file.parent)
        given = {key: tree[key] for key in _ON_COMMAND_LINE if key in tree}
        tree = {"name": own.get("name", file.stem), "recipe": str(file), **given}
        return cls.from_tree(tree, places)

    @classmethod
    def from_tree(
        cls, tree: Mapping[str, Any], places: Places | None = None, beside: Path | None = None
    ) -> Sweep:
        """Check a nested dict and the recipe of every trial.

        Recipe files are relative to the folder `beside`, or else shipped files.
        Raises: RecipeError with every error found.
        """
        places = places or {}
        plan = super().from_tree(tree, places)
        recipe, *others = (str(find_recipe(file, beside).resolve()) for file in plan._files)
        grid = {**plan.grid, "recipe": others} if others else plan.grid
        plan = plan.model_copy(update={"recipe": recipe, "grid": grid})
        plan.trials(places)
        return plan

    def to_yaml(self) -> str:
        """The resolved sweep as YAML, which `load` reads."""
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)

    def trials(self, places: Places | None = None) -> list[Trial]:
        """Every point of the grid with every seed; of a search, points with each value once.

        Raises: RecipeError with every error of every recipe.
        """
        trials: list[Trial] = []
        problems: dict[str, None] = {}  # The same value can be wrong in many trials.
        for point in self._points():
            try:
                trials += self.trials_at(point, places)
            except RecipeError as error:
                problems |= dict.fromkeys(error.problems)
        for name, times in Counter(trial.name for trial in trials).items():
            if times > 1:
                problems[f"grid: must not have a point twice, got {name}."] = None
        if problems:
            raise RecipeError(list(problems))
        return trials

    def trials_at(self, point: Mapping[str, Any], places: Places | None = None) -> list[Trial]:
        """A point of the grid with every seed. Raises: RecipeError with every error."""
        recipe = self._recipe(point, places or {})
        rules = self._wrong_recipe(recipe) if self.search else []
        if recipe.seed + self.seeds > 2**31:
            rule = f"seed: must be at most 2**31 - {self.seeds}, got {recipe.seed}"
            rules.append(f"{rule}. Choose a smaller seed, or fewer seeds.")
        if rules:
            raise RecipeError(rules)
        settings = {f: Path(v).stem if f == "recipe" else v for f, v in point.items()}
        label = self._labels()
        parts = [f"{label[f]}={_name_part(v)}" for f, v in settings.items()]
        return [
            Trial(_folder_name([*parts, f"seed={seed}"]), settings,
                  recipe.model_copy(update={"seed": seed}))
            for seed in range(recipe.seed, recipe.seed + self.seeds)
        ]  # fmt: skip

    def _labels(self) -> dict[str, str]:
        """The name of each field of the grid in the names of folders."""
        short = {field: field.rpartition(".")[2] for field in self.grid}
        clash = Counter(short.values())
        return {field: field if clash[last] > 1 else last for field, last in short.items()}

    def _wrong_recipe(self, recipe: Recipe) -> list[str]:
        """What a recipe lacks for the search."""
        assert self.search is not None
        rules, metric, figures = [], self.search.metric, recipe.eval.figures_of(recipe.eval.sets)
        if not figures:
            rules.append("eval.sets: must have a set, whose figure is searched for, got none.")
        elif metric is not None and metric not in figures:
            close = nearest(metric, figures)
            hint = f" Did you mean {close}?" if close else ""
            rule = f"search.metric: must be {', '.join(figures)}"
            rules.append(f"{rule}, got {short_repr(metric)}.{hint}")
        if self.search.prune and not recipe.eval.every:
            rule = "search.prune: must have evaluations while training"
            rules.append(f"{rule}, got eval.every=0. Set eval.every, or leave out --prune.")
        if self.search.prune and recipe.stages:
            rules.append("search.prune: must be a run without stages, got stages.")
        return rules

    def _points(self) -> Iterator[dict[str, Any]]:
        """The values of the fields of the grid at each point."""
        if self.search:
            yield from self._probes()
            return
        rng = Random(self.random_seed)
        if any(isinstance(values, Range) for values in self.grid.values()):
            yield from self._drawn_points(rng)
            return
        points = list(itertools.product(*self.grid.values()))
        if self.random:
            rng.shuffle(points)
        for values in points[: self.random]:
            yield dict(zip(self.grid, values, strict=True))

    def _probes(self) -> Iterator[dict[str, Any]]:
        """As many points as the longest list has values, so that each value is in one."""
        values = {f: sorted(set(v.bounds)) if isinstance(v, Range) else v
                  for f, v in self.grid.items()}  # fmt: skip
        for i in range(max(map(len, values.values()))):
            yield {field: each[min(i, len(each) - 1)] for field, each in values.items()}

    def _drawn_points(self, rng: Random) -> Iterator[dict[str, Any]]:
        """`random` distinct points. Raises: RecipeError if the ranges have too few values."""
        drawn: set[str] = set()
        for _ in range(_DRAWS_PER_POINT * (self.random or 0)):
            point = {field: values.draw(rng) if isinstance(values, Range) else rng.choice(values)
                     for field, values in self.grid.items()}  # fmt: skip
            key = as_text(point)
            if key not in drawn:
                drawn.add(key)
                yield point
            if len(drawn) == self.random:
                return
        rule = f"random: must be at most the {len(drawn):,} distinct points that were drawn"
        raise RecipeError([f"{rule}, got {self.random}. Draw fewer, or widen the ranges."])

    def _recipe(self, point: Mapping[str, Any], places: Places) -> Recipe:
        tree, at = read_tree(Path(point.get("recipe", self.recipe)))
        tree = merge(tree, self.overrides)
        at |= {where[1:]: place for where, place in places.items() if where[:1] == ("overrides",)}
        values = {field: value for field, value in point.items() if field != "recipe"}
        ratio = values.pop("group") if isinstance(values.get("group"), str) else None
        for field in point:
            if ("grid", field) in places:
                names = tuple(field.split("."))
                at = {w: place for w, place in at.items() if w[: len(names)] != names}
                at[names] = places["grid", field]
        for field, value in values.items():
            tree = merge(tree, nested(field, value))
        recipe = Recipe.from_tree(tree, at)
        if ratio is not None:
            composition = _composition(ratio, recipe.group, at)
            recipe = Recipe.from_tree(merge(tree, {"group": composition}), at)
        for number in range(len(recipe.stages)):
            recipe.stage(number)  # Checks the settings of the stage.
        return recipe


def grid_override(text: str) -> str:
    """The override of a sweep for `--grid objective.tau=0,0.5`.

    Raises: RecipeError if `text` is not a field with values.
    """
    field, _, values = (part.strip() for part in text.partition("="))
    if not field or not values:
        rule = f"--grid: must be field=value,value,..., got {text!r}."
        raise RecipeError([f"{COMMAND_LINE}: {rule} For example objective.tau=0,0.5,1."])
    is_range = re.match(r"\{\s*(log|uniform)\s*:", values)
    return f"grid={{{json.dumps(field)}: {values if is_range else f'[{values}]'}}}"


def _composition(ratio: str, group: GroupSettings, places: Places) -> dict[str, int]:
    """The group of a ratio: `6:2` is six demonstrations and two self samples.

    The number of experts is that of `group`; the other demonstrations are teachers, or experts if
    `group` has no teachers but experts. Raises: RecipeError for other texts.
    """
    found = re.fullmatch(r"(\d+):(\d+)", ratio)
    if not found:
        place = places.get(("group",))
        rule = f"group: must be demonstrations:self, such as 6:2, got {short_repr(ratio)}."
        raise RecipeError([f"{place}: {rule}" if place else rule])
    demonstrations, own = map(int, found.groups())
    experts_only = group.expert and not group.teacher
    wanted = group.expert if group.teacher else 1
    expert = demonstrations if experts_only else min(wanted, demonstrations)
    return {"expert": expert, "teacher": demonstrations - expert, "self": own}


def as_text(value: Any) -> str:
    """A value of a grid on one line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _name_part(value: Any) -> str:
    """A value as part of a folder name; a hash makes a shortened or changed one unique."""
    text = as_text(value)
    plain = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
    if len(plain) <= _MAX_VALUE and plain == text.replace(":", "-"):
        return plain
    return f"{plain[:_MAX_VALUE]}-{_digest(text)}"


def _folder_name(parts: Sequence[str]) -> str:
    name = ",".join(parts)
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()
