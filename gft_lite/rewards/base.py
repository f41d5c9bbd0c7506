"""The types of the reward package: grades, verdicts, rules and the settings of one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class RewardError(ValueError):
    """An error in a reward function or its settings; the message names the function."""


class Grade(NamedTuple):
    """The score that one rule gives to one text, and how it was obtained (see VERDICTS)."""

    score: float
    verdict: str = "ok"


#: In order of severity: a response scored by several functions gets the most severe verdict.
VERDICTS = ("ok", "no_answer", "unparsed", "timeout", "error")

#: A built-in rule: (text, gold answer, the row's `answer_type` or None) -> grade.
Rule = Callable[[str, str | None, str | None], Grade]


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function of a recipe: a name in REWARDS or a dotted path, weight, parameters."""

    name: str
    weight: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
