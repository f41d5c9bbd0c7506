"""The methods that a referee compares: their names, their own recipe fields, and their dials."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gft_lite.objective.methods import METHODS, Dial, find_method
from gft_lite.recipe.loader import (
    Tree,
    find_recipe,
    merge,
    only_fields,
    read_tree,
    without_fields,
)
from gft_lite.recipe.schema import METHOD_FIELDS, Recipe
from gft_lite.utils.errors import UserError, nearest, short_repr

RATE = "optim.lr"
Settings = Mapping[str, Any]  # Tuned fields of a recipe by dotted name.


@dataclass(frozen=True, slots=True)
class Contender:
    """A method of the comparison; `layer` has its own recipe fields, over those common to all.

    `stages` are the names of its stages, for one that trains by several methods in turn; these are
    contenders too, and its layer is empty.
    """

    name: str
    layer: Tree
    dial: Dial | None = None
    stages: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^\w.+-]+", "-", self.name, flags=re.ASCII)

    @property
    def dial_field(self) -> str:
        """The recipe field of the dial; empty without one."""
        return f"objective.{self.dial.parameter}" if self.dial else ""


def split_stages(entry: str) -> tuple[str, ...]:
    """The stages of an entry of --methods such as `sft+grpo`; one for a single method."""
    return (entry,) if os.path.isfile(entry) else tuple(entry.split("+"))


def code_and_files(methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """The code and the recipe files that entries of --methods name."""
    parts = [part for entry in methods for part in split_stages(entry)]
    files = [part for part in parts if _is_file(part)]
    code = [p for p in parts if p not in METHODS and p not in files]
    return [f"--methods: {path}" for path in code], files


def find_contenders(methods: Sequence[str], base: Recipe, tree: Tree) -> dict[str, Contender]:
    """The contenders of --methods by name, with those that are stages of others only.

    `tree` holds the fields of the recipe `base` as they are written. Modules of dotted methods are
    imported.

    Raises: UserError with every error of every entry.
    """
    found: dict[str, Contender] = {}
    problems: list[str] = []
    if repeated := sorted({name for name in methods if methods.count(name) > 1}):
        problems.append(f"--methods: must not name a method twice, got {', '.join(repeated)}.")
    elif len(methods) < 2:
        got = ", ".join(methods) or "none"
        problems.append(f"--methods: must be at least 2 methods, got {got}. Such as gft,sft.")
    for entry in methods:
        stages = split_stages(entry)
        try:
            for part in stages:
                name = _short_name(part)
                layer = _layer(part, base, tree)
                contender = Contender(name, layer, find_method(layer["method"]).dial)
                if found.setdefault(name, contender) != contender:
                    rule = "must have different names, got another method of the name"
                    raise UserError([f"--methods: {rule} {name}. Rename the file."])
        except UserError as error:
            problems += [p for p in error.problems if p not in problems]
            continue
        if len(stages) > 1:
            names = tuple(map(_short_name, stages))
            found["+".join(names)] = Contender("+".join(names), {}, stages=names)
    if problems:
        raise UserError(problems)
    return found


def names_of(methods: Sequence[str]) -> tuple[str, ...]:
    """The names of the contenders of --methods."""
    return tuple("+".join(map(_short_name, split_stages(entry))) for entry in methods)


def common_fields(tree: Tree) -> Tree:
    """The fields of a recipe that all methods share, but for what is evaluated."""
    return without_fields(tree, (*METHOD_FIELDS, "method", "stages", "budget", "eval"))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _short_name(part: str) -> str:
    return Path(part).stem if _is_file(part) else part


def _layer(part: str, base: Recipe, tree: Tree) -> Tree:
    """The recipe fields of a method, over those that all methods share.

    Of the recipe's own method they are the recipe's, of another one its defaults. A file adds those
    that it holds. Raises: UserError.
    """
    if not _is_file(part):
        return _method_layer(part, base, tree)
    written = read_tree(find_recipe(part))[0]
    below = _method_layer(str(written.get("method", base.method)), base, tree)
    layer = merge(below, only_fields(written, (*METHOD_FIELDS, "method", "teacher")))
    if others := sorted(_others(written, tree)):
        rule = "must differ from the recipe only in method, group, objective, optim.lr and teacher"
        raise UserError([f"--methods: {part}: {rule}, got {', '.join(others)}."])
    return layer


def _others(written: Tree, tree: Tree) -> Iterator[str]:
    """Sections of a file that would make the comparison unequal."""
    free = ("method", "teacher", "name", "train.steps", "train.problems_per_step")
    for name, value in without_fields(written, (*METHOD_FIELDS, *free)).items():
        if value != {} and merge(tree, {name: value})[name] != tree.get(name):
            yield name


def _method_layer(name: str, base: Recipe, tree: Tree) -> Tree:
    if name == base.method:
        own = only_fields(tree, METHOD_FIELDS)
        return merge(_defaults(name), {"method": name, **own})
    return {"method": name, **_defaults(name)}


def _defaults(name: str) -> Tree:
    """The default fields of a method. Raises: UserError for an unknown one."""
    if name not in METHODS and not re.search(r"[.:]", name):
        close = nearest(name, METHODS)
        hint = f" Did you mean {close}?" if close else " gft-lite methods lists them."
        rule = "must be methods, files or dotted paths"
        raise UserError([f"--methods: {rule}, got {short_repr(name)}.{hint}"])
    try:
        return merge({}, find_method(name).defaults)
    except ValueError as error:
        raise UserError([f"--methods: {error}, got {short_repr(name)}."]) from error
