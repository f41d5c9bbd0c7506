"""TODO: gft_lite/rewards/base.py"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class RewardError(ValueError):
    """A reward function that cannot be found, built or trusted; the text names it."""


class Grade(NamedTuple):
    """What one rule says of one text: its score and how the score came about (VERDICTS)."""

    score: float
    verdict: str = "ok"


#: From harmless to grave; a response scored by several rules keeps the gravest.
VERDICTS = ("ok", "no_answer", "unparsed", "timeout", "error")

#: A built-in rule: (text, gold answer, the row's `answer_type` or None) to a grade.
Rule = Callable[[str, str | None, str | None], Grade]


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """One reward of a recipe: a name in REWARDS or a dotted path, and its share of the sum."""

    name: str
    weight: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
