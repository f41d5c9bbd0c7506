"""Texts of validation errors: a line each with place, field, rule, value and advice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from gft_lite.recipe.annotations import section_class, union_members
from gft_lite.utils.errors import dotted_path, nearest, short_repr


@dataclass(frozen=True)
class Place:
    """The file and line of a value."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


At = tuple[str | int, ...]
Places = dict[At, Place]
UNKNOWN_FIELD = "unknown_field"  # pydantic error type; its context has the `known` names.


@dataclass(frozen=True)
class Problem:
    """The parts of an error text."""

    at: At
    rule: str
    got: str
    advice: str = ""

    def place(self, places: Places) -> Place | None:
        """The place of the value, or of the section that lacks it."""
        above = (self.at[:i] for i in range(len(self.at), -1, -1))
        return next((places[at] for at in above if at in places), None)

    def text(self, places: Places) -> str:
        place = self.place(places)
        where = f"{place}: " if place else ""
        advice = f" {self.advice}" if self.advice else ""
        return f"{where}{dotted_path(self.at) or 'recipe'}: {self.rule}, got {self.got}.{advice}"


def explain(
    error: ValidationError, schema: type[BaseModel], places: Places, *, cross_fields: bool = True
) -> list[str]:
    """One line for each error of a tree checked against `schema`, in the order of the files."""
    problems: list[Problem] = []
    branches: dict[At, list[Problem]] = {}
    for e in error.errors(include_url=False):
        unknown = e["type"] in ("extra_forbidden", UNKNOWN_FIELD)
        at, kind, union = _follow(schema, e["loc"][:-1] if unknown else e["loc"])
        section = section_class(kind)
        if unknown:
            fields = section.model_fields if section else {}
            known = e.get("ctx", {}).get("known", fields)
            problems.append(_unknown(schema, (*at, e["loc"][-1]), known, e["input"]))
        elif e["type"] == "value_error" and section:
            problems += _cross_fields(at, section, e) if cross_fields else []
        elif union is None:
            problems.append(_one_field(at, kind, e))
        else:
            branches.setdefault(union, []).append(_one_field(at, kind, e))
    for at, found in branches.items():
        problems += _one_of_union(at, found)

    def order(problem: Problem) -> tuple[str, int]:
        place = problem.place(places)
        return (place.file, place.line or 0) if place else ("", 0)

    return [problem.text(places) for problem in sorted(problems, key=order)]


# Rules for pydantic's error types; other types keep pydantic's text.
_RULES = {
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a section of fields",
    "model_type": "must be a section of fields",
    "invalid_key": "must have text as keys",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
}


def _one_field(at: At, kind: Any, e: Any) -> Problem:
    if e["type"] == "missing":
        return Problem(at, "is required", "nothing")
    got = e["input"]
    rule = _RULES.get(e["type"]) or re.sub(r"^\w+ should", "must", e["msg"])
    rule = rule.removeprefix("Value error, ").partition(" after validation")[0]
    known = e["ctx"]["known"] if e["type"] == "unknown_name" else _allowed(e)
    name = nearest(got, known) if isinstance(got, str | None) else None
    advice = f"Did you mean {name}?" if name else ""
    if e["type"] == "string_type" and not name and isinstance(got, int | float | dict):
        advice = "Put it in quotes."
    elif e["type"] == "model_type" and got is None:
        advice = "Write its fields under it, or leave it out."
    return Problem(at, rule, short_repr(got), advice)


def _allowed(e: Any) -> list[str]:
    """The texts that a Literal allows."""
    return re.findall(r"'([^']*)'", e.get("ctx", {}).get("expected", ""))


def _one_of_union(at: At, found: list[Problem]) -> list[Problem]:
    """The errors of all members of a union as one, or those inside of the member that fits."""
    deeper = [problem for problem in found if len(problem.at) > len(at)]
    rules = [found[0].rule, *(re.sub("^must (be )?", "", each.rule) for each in found[1:])]
    return deeper or [Problem(at, " or ".join(rules), found[0].got, found[0].advice)]


def _cross_fields(at: At, section: type[BaseModel], e: Any) -> list[Problem]:
    """The errors of a section's own check, a line each: `field: rule`, or a rule for all of it."""
    problems = []
    for line in str(e["ctx"]["error"]).splitlines():
        field, _, rule = line.partition(": ")
        names = tuple(field.split("."))
        if rule and _follow(section, names)[0] == names:
            got = short_repr(_value_below(section, e["input"], names))
            problems.append(Problem((*at, *names), rule, got))
        else:
            problems.append(Problem(at, line, short_repr(e["input"])))
    return problems


def _value_below(schema: Any, value: Any, names: tuple[str, ...]) -> Any:
    """The value of a field in a section's input, or its default."""
    for name in names:
        section = section_class(schema)
        field = section.model_fields.get(name) if section else None
        default = field.get_default(call_default_factory=True) if field else None
        written = value if isinstance(value, Mapping) else dict(value)
        value, schema = written.get(name, default), _child(schema, name)
    return value


def _unknown(schema: type[BaseModel], at: At, known: Iterable[str], got: Any) -> Problem:
    """An unknown field of a section with the fields `known`, and the likely right name."""
    name, above = str(at[-1]), at[:-1]
    here = [*known, *(() if above else ("extends",))]
    everywhere = _all_fields(schema)
    elsewhere = [field for field in everywhere if field.rpartition(".")[2] == name.lower()]
    close = nearest(name, here, 0.75) or (nearest(name, here, 0.6) if not elsewhere else None)
    advice = ""
    if name in everywhere:
        parent, _, child = name.rpartition(".")
        advice = f"Write {child} under {parent}."
    elif close or elsewhere:
        meant = [dotted_path((*above, close))] if close else elsewhere[:3]
        advice = f"Did you mean {' or '.join(meant)}?"
    return Problem(at, "unknown field", short_repr(got), advice)


# --- the schema's types ----------------------------------------------------------------------


def _follow(schema: Any, loc: At) -> tuple[At, Any, At | None]:
    """The field's path in pydantic's `loc`, its type, and the path of a union that `loc` enters."""
    at: At = ()
    union = None
    for part in loc:
        child = _child(schema, part)
        if child is not None:
            at, schema = (*at, part), child
        elif union is None:
            union = at
    return at, schema, union


def _child(annotation: Any, part: str | int) -> Any:
    """The type of a field, of an item or of a named section; None if there is no such part."""
    for kind in union_members(annotation):
        if get_origin(kind) in (list, tuple) and isinstance(part, int):
            return get_args(kind)[0]
        if get_origin(kind) is dict:
            return get_args(kind)[1]
        section = section_class(kind)
        if section and part in section.model_fields:
            return section.model_fields[str(part)].annotation
        if section and section.model_config.get("extra") == "allow":
            return Any
    return None


def _all_fields(schema: type[BaseModel], above: At = ()) -> list[str]:
    """The dotted path of every field outside of lists and named sections."""
    paths = []
    for name, field in schema.model_fields.items():
        section = section_class(field.annotation)
        paths.append(dotted_path((*above, name)))
        paths += _all_fields(section, (*above, name)) if section else []
    return paths
