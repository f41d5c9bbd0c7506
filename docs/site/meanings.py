"""What fields, parameters of methods and parameters of rewards mean, as their code says.

The meaning of a field is the string below it in its class; that of a parameter is in the `Args:` of
the function that takes it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from pydantic.fields import FieldInfo

from gft_lite.objective.method import Method
from gft_lite.rewards.judge import JudgeSettings
from gft_lite.rewards.registry import JUDGE, REWARDS
from gft_lite.utils.imports import load_dotted


def field_meanings(owner: type) -> dict[str, str]:
    """The meanings of the fields of a section or a dataclass and of its bases, by name."""
    found: dict[str, str] = {}
    for each in reversed(owner.__mro__):
        known = _module(each.__module__) if each.__module__.startswith("gft_lite.") else None
        members = known[each.__name__].members if known and each.__name__ in known.members else {}
        found |= {
            name: _one_line(member.docstring.value)
            for name, member in members.items()
            if member.is_attribute and member.docstring and "property" not in member.labels
        }
    # A field that a class body can't have is described where it is made.
    fields: Mapping[str, FieldInfo] = getattr(owner, "model_fields", {})
    return found | {n: field.description for n, field in fields.items() if field.description}


def parameter_meanings(functions: Iterable[Callable[..., Any] | None]) -> dict[str, str]:
    """The meanings in the docstrings of functions, by parameter."""
    return {
        parameter.name: _one_line(parameter.description)
        for function in functions
        if function
        for section in _sections(function)
        if section.kind is griffe.DocstringSectionKind.parameters
        for parameter in section.value
    }


def method_meanings(method: Method) -> dict[str, str]:
    """The meanings of a method's own parameters."""
    return parameter_meanings((method.loss, method.select, method.prefixes))


def reward_meanings(name: str) -> dict[str, str]:
    """The meanings of the parameters of a rule of `REWARDS`."""
    if name == JUDGE:
        return field_meanings(JudgeSettings)
    return parameter_meanings([load_dotted(REWARDS[name].make)])


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
