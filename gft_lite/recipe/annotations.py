"""What the type annotations of a schema say: members of unions, sections."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def union_members(annotation: Any) -> list[Any]:
    """The members of a union, or the type itself, without their metadata."""
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in union_members(member)]
    return [annotation]


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The class of the section that an annotation allows, if it allows one."""
    for kind in union_members(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
