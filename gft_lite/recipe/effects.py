"""What each field of a recipe has an effect on, as metadata of the field.

A field without metadata of its own has that of the section it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Flag, auto
from typing import Any

from pydantic import BaseModel

from gft_lite.recipe.annotations import section_class


class Affects(Flag):
    """Results that depend on a field. None: memory, speed and output only."""

    RUN = auto()  # The trained policy and the figures of the run.
    BASE = auto()  # The evaluation of the base, and the responses of the KL set.
    GROUPS = auto()  # The groups that are sampled from the base, and their rewards.


NO_RESULT = Affects(0)
TRAINING = Affects.RUN
EVALUATION = Affects.RUN | Affects.BASE
SAMPLING = Affects.RUN | Affects.GROUPS
EVERYTHING = Affects.RUN | Affects.BASE | Affects.GROUPS

IncludeTree = dict[str, Any]  # As pydantic's `include`: True, or a tree for a part of a section.


def fields_affecting(schema: type[BaseModel], results: Affects) -> IncludeTree:
    """The fields of a schema on which all of `results` depend.

    Raises: TypeError for a field without metadata.
    """
    return _included(schema, results, "")


def _included(schema: type[BaseModel], results: Affects, above: str) -> IncludeTree:
    tree: IncludeTree = {}
    for name, field in schema.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Affects)]
        section = section_class(field.annotation)
        if marks:
            if results in marks[-1]:
                tree[name] = True
        elif section is None:
            raise TypeError(f"{above}{name}: must have an Affects in its metadata")
        elif below := _included(section, results, f"{above}{name}."):
            tree[name] = below
    return tree


def values_affecting(settings: BaseModel, results: Affects) -> dict[str, Any]:
    """The values on which all of `results` depend, as JSON has them, by dotted name."""
    include = fields_affecting(type(settings), results)
    return dict(leaves(settings.model_dump(mode="json", include=include)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of whatever differs; None for a value that is not there."""
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in a tree that is no section, or an empty one."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
