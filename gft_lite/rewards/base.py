"""The types of the reward package: grades, verdicts, rules and the settings of one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gft_lite.utils.errors import RewardError


class Grade(NamedTuple):
    """The score that one rule gives to one text, and how it was obtained (see VERDICTS).

    Without a score, grading failed: the response has no reward then.
    """

    score: float | None
    verdict: str = "ok"


#: In order of severity: a response scored by several functions gets the most severe verdict.
#: "not_applicable": every function returned None, so the response has no reward.
VERDICTS = ("not_applicable", "ok", "no_answer", "unparsed", "timeout", "error")

#: A built-in rule: (text, gold answer, the row's `answer_type` or None) -> grade.
Rule = Callable[[str, str | None, str | None], Grade]


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function of a recipe: a name in REWARDS or a dotted path, weight, parameters.

    `correct_above`: a response with a score above this is correct; None: the rule's own threshold.
    """

    name: str
    weight: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    correct_above: float | None = None


#: Sums and squares of rewards up to this magnitude are finite in float32.
MAX_REWARD = 1e15


def check_magnitude(what: str, value: float) -> None:
    """Check the magnitude of a score or a reward.

    Raises: RewardError if it is above MAX_REWARD or NaN.
    """
    if not abs(value) <= MAX_REWARD:
        raise RewardError(
            f"{what} must be at most {MAX_REWARD:g} in magnitude, got {value:g}. "
            "Scale the scores or weights down."
        )
