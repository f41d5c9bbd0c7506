"""The sweep's schema: fields and their values, made into trials, each of them a checked recipe."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, PositiveInt, ValidationError, model_validator

from gft_lite.recipe.base import Settings
from gft_lite.recipe.loader import COMMAND_LINE, Dumper, find_recipe, gather, merge, read_tree
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import GroupSettings
from gft_lite.recipe.validation_errors import Places, explain
from gft_lite.utils.errors import RecipeError, short_repr

_ON_COMMAND_LINE = ("overrides", "grid", "random", "random_seed", "seeds")
_LONGEST_VALUE = 40  # of a folder's name, in characters


class Range(Settings):
    """Values between two bounds, drawn evenly on a plain or on a logarithmic scale."""

    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_scale(self) -> Range:
        if (self.uniform is None) == (self.log is None):
            raise ValueError("must have one of uniform and log")
        if self.log and min(self.log) <= 0:
            raise ValueError("log: must have bounds above 0")
        return self

    def draw(self, rng: random.Random) -> float:
        """A value with four digits, as many as anybody wants to read."""
        if self.log:
            value = math.exp(rng.uniform(*map(math.log, self.log)))
        else:
            value = rng.uniform(*(self.uniform or (0, 0)))
        return float(f"{value:.4g}")


Values = Annotated[list[Any], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep: its folder's name, what the grid set, and the recipe that comes of it."""

    name: str
    settings: dict[str, Any]
    recipe: Recipe


class Sweep(Settings):
    """A recipe, changed by `overrides`, at every point of a grid, with several seeds.

    A field of the grid is any of the recipe's, such as `objective.tau`. `group` may have values
    such as `6:2`, demonstrations to self samples; `recipe` has recipe files. `random` points
    are drawn from the grid by `random_seed`; more of them keep the earlier ones. The `seeds`
    count up from the recipe's own.
    """

    name: str = "sweep"
    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, Values | Range] = Field(default_factory=dict)
    random: PositiveInt | None = None
    random_seed: int = 0
    seeds: PositiveInt = 1

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        rules = []
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            rules.append("name: must be letters, digits, `_`, `-` and `.`, to name a folder")
        if "seed" in self.grid:
            rules.append("grid: must leave the seed to `seeds`")
        if not all(isinstance(file, str) for file in self._files[1:]):
            rules.append("grid: must have a list of files as `recipe`")
        ranges = [field for field, values in self.grid.items() if isinstance(values, Range)]
        points = math.prod(len(v) for v in self.grid.values() if isinstance(v, list))
        if ranges and not self.random:
            rules.append(f"random: must say how many points to draw, as {ranges[0]} has a range")
        elif not ranges and self.random and self.random > points:
            rules.append(f"random: must be at most {points}, the points of the grid")
        if rules:
            raise ValueError("\n".join(rules))
        return self

    @property
    def _files(self) -> list[Any]:
        """The recipe, and those of the grid."""
        values = self.grid.get("recipe", [])
        return [self.recipe, *(values if isinstance(values, list) else [values])]

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
        """A sweep file, or a recipe and the rest of the sweep in `overrides`.

        Overrides are of the sweep: `seeds=3`, `overrides.optim.lr=1e-3`, `grid={...}`. Raises:
        RecipeError with every error of the sweep and of its recipes.
        """
        file = find_recipe(path)
        tree, places, problems = gather(file, overrides)
        if problems:
            raise RecipeError(problems)
        own = gather(file)[0]
        if {"recipe", "grid"} & set(own):
            return cls.from_tree(tree, places, file.parent)
        asked = {key: tree[key] for key in _ON_COMMAND_LINE if key in tree}
        tree = {"name": own.get("name", file.stem), "recipe": str(file), **asked}
        return cls.from_tree(tree, places)

    @classmethod
    def from_tree(
        cls, tree: Mapping[str, Any], places: Places | None = None, beside: Path | None = None
    ) -> Sweep:
        """Check a nested dict, and every recipe that comes of it.

        Recipe files are looked for in the folder `beside`, then among the shipped ones.
        Raises: RecipeError with every error found.
        """
        places = places or {}
        try:
            made = cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(explain(error, cls, places)) from None
        recipe, *others = (str(find_recipe(file, beside).resolve()) for file in made._files)
        grid = {**made.grid, "recipe": others} if others else made.grid
        made = made.model_copy(update={"recipe": recipe, "grid": grid})
        made.trials(places)
        return made

    def to_yaml(self) -> str:
        """The resolved sweep, as YAML that `load` reads back."""
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)

    def trials(self, places: Places | None = None) -> list[Trial]:
        """Every point of the grid with every seed.

        Raises: RecipeError with every error of every recipe.
        """
        short = {field: field.rpartition(".")[2] for field in self.grid}
        clash = Counter(short.values())
        label = {field: field if clash[last] > 1 else last for field, last in short.items()}
        made: list[Trial] = []
        problems: dict[str, None] = {}  # A value is wrong in many trials and told once.
        for point in self._points():
            try:
                recipe = self._recipe(point, places or {})
            except RecipeError as error:
                problems |= dict.fromkeys(error.problems)
                continue
            for seed in range(recipe.seed, recipe.seed + self.seeds):
                settings = {f: Path(v).stem if f == "recipe" else v for f, v in point.items()}
                parts = [f"{label[f]}={_in_a_name(v)}" for f, v in settings.items()]
                seeded = recipe.model_copy(update={"seed": seed})
                made.append(Trial(",".join([*parts, f"seed={seed}"]), settings, seeded))
        for name, times in Counter(trial.name for trial in made).items():
            if times > 1:
                problems[f"grid: must not have a point twice, got {name}."] = None
        if problems:
            raise RecipeError(list(problems))
        return made

    def _points(self) -> Iterator[dict[str, Any]]:
        """The values of the fields of the grid, at each point."""
        rng = random.Random(self.random_seed)
        if any(isinstance(values, Range) for values in self.grid.values()):
            for _ in range(self.random or 0):
                yield {field: values.draw(rng) if isinstance(values, Range) else rng.choice(values)
                       for field, values in self.grid.items()}  # fmt: skip
            return
        points = list(itertools.product(*self.grid.values()))
        if self.random:
            rng.shuffle(points)
        for values in points[: self.random]:
            yield dict(zip(self.grid, values, strict=True))

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
            tree = merge(tree, _nested(field.split("."), value))
        recipe = Recipe.from_tree(tree, at)
        if ratio is not None:
            composition = _composition(ratio, recipe.group, at)
            recipe = Recipe.from_tree(merge(tree, {"group": composition}), at)
        for number in range(len(recipe.stages)):
            recipe.stage(number)  # Their settings are checked, too.
        return recipe


def grid_override(text: str) -> str:
    """`objective.tau=0,0.5` of the command line as an override of a sweep.

    Raises: RecipeError unless it is a field and its values.
    """
    field, _, values = (part.strip() for part in text.partition("="))
    if not field or not values:
        rule = f"--grid: must be field=value,value,..., got {text!r}."
        raise RecipeError([f"{COMMAND_LINE}: {rule} For example objective.tau=0,0.5,1."])
    is_range = re.match(r"\{\s*(log|uniform)\s*:", values)
    return f"grid={{{json.dumps(field)}: {values if is_range else f'[{values}]'}}}"


def _nested(names: Sequence[str], value: Any) -> Any:
    return {names[0]: _nested(names[1:], value)} if names else value


def _composition(ratio: str, group: GroupSettings, places: Places) -> dict[str, int]:
    """`6:2` is six demonstrations and two self samples, the experts as many as in `group`.

    The rest are teachers, unless the group has experts only. Raises: RecipeError.
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
    """A value of a grid, as one line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _in_a_name(value: Any) -> str:
    """A value as a part of a folder's name; what can't be told from it is made one by a hash."""
    text = as_text(value)
    plain = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
    if len(plain) <= _LONGEST_VALUE and plain == text.replace(":", "-"):
        return plain
    digest = hashlib.blake2b(text.encode(), digest_size=3).hexdigest()
    return f"{plain[:_LONGEST_VALUE]}-{digest}"
