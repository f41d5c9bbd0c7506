"""What fields of a recipe and parameters of methods mean, as their code says.

The meaning of a field is the string below it in its section; that of a method's own parameter is in
the `Args:` of the function that takes it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from pydantic import BaseModel

from gft_lite.objective.method import Method


def field_meanings(schema: type[BaseModel]) -> dict[str, str]:
    """The meanings below the attributes of a section and of its bases, by name."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        known = _module(owner.__module__) if owner.__module__.startswith("gft_lite.") else None
        members = known[owner.__name__].members if known and owner.__name__ in known.members else {}
        found |= {
            name: _one_line(member.docstring.value)
            for name, member in members.items()
            if member.is_attribute and member.docstring and "property" not in member.labels
        }
    # A field that a class body can't have is described where it is made.
    made = {n: f.description for n, f in schema.model_fields.items() if f.description}
    return found | made


def parameter_meanings(method: Method) -> dict[str, str]:
    """The meanings in the docstrings of a method's functions, by parameter."""
    functions = [f for f in (method.loss, method.select, method.prefixes) if f]
    return {
        parameter.name: _one_line(parameter.description)
        for function in functions
        for section in _sections(function)
        if section.kind is griffe.DocstringSectionKind.parameters
        for parameter in section.value
    }


def prose(function: Callable[..., Any]) -> str:
    """The docstring of a function without its parameters."""
    texts = (s.value for s in _sections(function) if s.kind is griffe.DocstringSectionKind.text)
    return "\n\n".join(texts)


def _sections(function: Callable[..., Any]) -> list[griffe.DocstringSection]:
    return griffe.Docstring(inspect.getdoc(function) or "").parse("google", warnings=False)


@cache
def _module(name: str) -> griffe.Module:
    file = Path(inspect.getfile(sys.modules[name]))
    return griffe.visit(name, filepath=file, code=file.read_text(encoding="utf-8"))


def _one_line(text: str) -> str:
    return " ".join(text.split())
