"""The format reward: the response must have the required form, whatever its answer is."""

from __future__ import annotations

import re

from gft_lite.rewards.base import Grade, RewardError, Rule
from gft_lite.rewards.extract import boxes


def make(pattern: str | None = None) -> Rule:
    r"""Build the rule: the text matches `pattern` (DOTALL), or has exactly one closed \boxed{}.

    Args:
        pattern: Regular expression of the whole response, in which `.` is any character; null:
            exactly one closed `\boxed{}`.

    Raises: RewardError if the pattern is not a regular expression.
    """
    if pattern is None:
        return _one_box
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise RewardError(
            f"reward 'format': pattern must be a regular expression, got {pattern!r} ({error}). "
            "Fix it, or leave it out."
        ) from error

    def grade(text: str, answer: str | None = None, answer_type: str | None = None) -> Grade:
        return Grade(float(compiled.fullmatch(text) is not None))

    return grade


def _one_box(text: str, answer: str | None = None, answer_type: str | None = None) -> Grade:
    return Grade(float(len(boxes(text)) == 1))
