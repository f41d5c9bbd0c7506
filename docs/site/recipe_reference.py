"""The page of recipe fields, section by section, and their JSON schema."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from meanings import field_meanings, method_meanings
from page_parts import as_yaml, cell, code, table
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gft_lite.objective.methods import METHODS
from gft_lite.recipe import Recipe
from gft_lite.recipe.annotations import section_class, union_members
from gft_lite.recipe.effects import Affects
from gft_lite.recipe.objective_schema import builtin_schema
from gft_lite.recipe.sections import (
    DataSettings,
    ObjectiveSettings,
    RewardFunctionSettings,
    StageSettings,
)

_RESULTS = {
    Affects.RUN | Affects.BASE | Affects.GROUPS: "all results",
    Affects.RUN | Affects.BASE: "training, evaluation",
    Affects.RUN | Affects.GROUPS: "training, presampled groups",
    Affects.RUN: "training",
    Affects(0): "speed, memory, output",
}
EVAL_SET = "eval.sets.NAME"
# Sections that occur in lists or by name: their place and class, by the field that has them.
_REPEATED: dict[str, tuple[str, type[BaseModel]]] = {
    "eval.sets": (EVAL_SET, DataSettings),
    "reward.functions": ("reward.functions[]", RewardFunctionSettings),
    "stages": ("stages[]", StageSettings),
}


def sections(
    at: str = "", schema: type[BaseModel] = Recipe
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a recipe by its dotted name; the recipe itself has none."""
    yield at, schema
    for name, field in schema.model_fields.items():
        path = f"{at}.{name}".strip(".")
        if below := section_class(field.annotation):
            yield from sections(path, below)
        elif path in _REPEATED:
            yield _REPEATED[path]


def recipe_page() -> str:
    """Every field of a recipe with its meaning, its type, its default and what it affects."""
    page = [
        "# Recipe fields\n\nWritten from the schema. *affects* lists the results that change with "
        "the field; a run is [resumed](../guides/resume.md) only with the same values of fields "
        "that affect training. `gft-lite train RECIPE --dry-run` prints a recipe with every "
        "default. [Recipes](../guides/recipes.md) has an example.\n"
    ]
    inherited: dict[str, Affects] = {}
    for at, schema in sections():
        page.append(f"## {at or 'The recipe'} {{ #{_slug(at) or 'recipe'} }}\n")
        if at == EVAL_SET:  # With the sections of the training data.
            names = ", ".join(f"`{name}`" for name in schema.model_fields)
            text = f"Each set has the fields {names}, which mean what they do under [data](#data)."
            page.append(f"{text} They affect training and evaluation.\n")
            continue
        page.append(inspect.cleandoc(schema.__doc__ or "") + "\n")
        meanings = field_meanings(schema)
        rows = []
        for name, field in schema.model_fields.items():
            path = f"{at}.{name}".strip(".")
            # Headings have the names of the fields at the top.
            cells = _field(path, field, meanings.get(name, ""), f"{{ #{path} }}" if at else "")
            rows.append([*cells, _affects(at, name, field, inherited)])
        page.append(_fields_table("affects", rows))
        if schema is ObjectiveSettings:
            page.append(_parameters())
    return "\n".join(page)


def _slug(at: str) -> str:
    return re.sub(r"[^a-z_]", "", at.lower())


def _fields_table(last: str, rows: Sequence[Sequence[str]]) -> str:
    # Narrow pages show the cells of a row below each other (site.css).
    return (
        f'<div class="fields {last}" markdown>\n\n{table(["field", "meaning", last], rows)}</div>\n'
    )


def _field(path: str, field: FieldInfo, meaning: str, anchor: str = "") -> list[str]:
    """The cells of a field's name, with type and default, and of its meaning."""
    if section_class(field.annotation):
        return [f"`{path}`<br>[section](#{_slug(path)})", _text(meaning)]
    shown = "required"
    if not field.is_required():
        shown = f"default {code(as_yaml(field.get_default(call_default_factory=True)))}"
    return [f"`{path}`{anchor}<br>{cell(_kind(field))}<br>{shown}", _text(meaning)]


def _text(meaning: str) -> str:
    return cell(meaning[:1].upper() + meaning[1:])


def _affects(at: str, name: str, field: FieldInfo, inherited: dict[str, Affects]) -> str:
    """What the field affects; without metadata, what its section does."""
    marks = [m for m in field.metadata if isinstance(m, Affects)]
    affects = marks[-1] if marks else inherited.get(at.removesuffix("[]"))
    if affects is None:
        return ""
    inherited[f"{at}.{name}".strip(".")] = affects
    return _RESULTS[affects]


def _kind(field: FieldInfo) -> str:
    """The type of a field in words, with its limits."""
    parts = []
    for kind in union_members(field.annotation):
        if get_origin(kind) is Literal:
            parts += [str(value) for value in get_args(kind)]
        else:
            parts.append(_name(kind))
    names = list(dict.fromkeys(parts))
    limits = [text for m in _metadata(field.annotation, field.metadata) if (text := _limit(m))]
    return ", ".join(names) + (f"; {' and '.join(dict.fromkeys(limits))}" if limits else "")


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true, false", dict: "mapping",
          list: "list", tuple: "list", type(None): "null", Any: "any value"}  # fmt: skip


def _name(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin in (list, tuple):
        inner = [union_members(a)[0] for a in get_args(kind)[:1]]
        if inner and get_origin(inner[0]) is Literal:
            return f"list of {', '.join(map(str, get_args(inner[0])))}"
        word = {str: "texts", int: "whole numbers", float: "numbers"}
        return f"list of {word[inner[0]]}" if inner and inner[0] in word else "list"
    return _NAMES.get(origin, getattr(origin, "__name__", str(origin)))


def _metadata(annotation: Any, own: Sequence[Any]) -> Iterator[Any]:
    """The metadata of a field and of the members of its union."""
    yield from own
    if hasattr(annotation, "__metadata__"):
        for mark in annotation.__metadata__:
            yield mark
            yield from getattr(mark, "metadata", ())
    for member in get_args(annotation) if get_origin(annotation) is not Literal else ():
        if get_origin(annotation) not in (list, dict, tuple):
            yield from _metadata(member, ())


def _limit(mark: Any) -> str | None:
    words = {
        Ge: ("ge", "at least"),
        Gt: ("gt", "above"),
        Le: ("le", "at most"),
        Lt: ("lt", "below"),
    }
    for kind, (name, word) in words.items():
        if isinstance(mark, kind):
            return f"{word} {getattr(mark, name):,g}" if getattr(mark, name) < 1e6 else None
    return f"at least {mark.min_length} long" if isinstance(mark, MinLen) else None


def _parameters() -> str:
    """The parameters that the methods' own losses add to `objective`."""
    rows = []
    for name, method in METHODS.items():
        fields, meanings = builtin_schema(name).model_fields, method_meanings(method)
        rows += [
            [*_field(f"objective.{own}", fields[own], meanings.get(own, "")),
             f"[{name}](methods.md#{name})"]
            for own in method.parameters
            if own not in ObjectiveSettings.model_fields
        ]  # fmt: skip
    return "Parameters of single methods:\n\n" + _fields_table("method", rows)


def recipe_schema() -> str:
    """The JSON schema of a recipe file with the meaning of each field, for editors."""
    schema = Recipe.model_json_schema()
    path = {"type": "string"}
    schema["properties"]["extends"] = {
        "anyOf": [path, {"type": "array", "items": path}],
        "description": "Files that the recipe builds on; later ones and the recipe itself win.",
    }
    for _, section in sections():
        place = schema if section is Recipe else schema["$defs"][section.__name__]
        for name, meaning in field_meanings(section).items():
            place["properties"][name]["description"] = meaning
    return json.dumps(schema, indent=1)
