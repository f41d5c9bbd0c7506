"""The table of built-in reward rules, and the loading of user-defined reward functions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gft_lite.rewards.base import RewardError, RewardFunction
from gft_lite.utils.imports import load_dotted


@dataclass(frozen=True, slots=True)
class RewardEntry:
    """One built-in rule: its factory as "module:function", where it runs and what it needs.

    `in_worker`: graded in a worker process, since the rule may hang on hostile text.
    `correct_above`: the score above which a response is correct; None if the rule does not
    compare the answer.
    """

    make: str
    in_worker: bool
    needs_answer: bool
    correct_above: float | None
    doc: str


_HERE = "gft_lite.rewards"
JUDGE = "judge"
JUDGES = rf"{JUDGE}(-[a-z]\w*)?"  # Several judges have names of their own, such as judge-style.

REWARDS: dict[str, RewardEntry] = {
    "math": RewardEntry(
        f"{_HERE}.math_rule:make", True, True, 0.5,
        "1 if the stated final answer equals the gold answer mathematically (choice rows too)",
    ),
    "choice": RewardEntry(
        f"{_HERE}.choice_rule:make", True, True, 0.5,
        "1 if the one chosen letter, or the text of the answer, equals the gold answer",
    ),
    "exact": RewardEntry(
        f"{_HERE}.exact_rule:make", False, True, 0.5,
        "1 if the text after the last `marker` equals the gold answer character by character",
    ),
    "format": RewardEntry(
        f"{_HERE}.format_rule:make", True, False, None,
        r"1 if the response matches `pattern` (default: exactly one closed \boxed{})",
    ),
    JUDGE: RewardEntry(
        f"{_HERE}.judge:make", False, False, None,
        "0 to 1: a language model's score of the answer by a `rubric`, or its rank in the group",
    ),
}  # fmt: skip


def load_function(path: str) -> Callable[..., Any]:
    """Import the user-defined function at "pkg.mod:name" or "pkg.mod.name".

    Raises: RewardError if there is no such function.
    """
    if not re.fullmatch(r"[\w.]+[.:]\w+", path):
        raise RewardError(_unknown(path))
    try:
        function = load_dotted(path)
    except ValueError as error:
        raise RewardError(f"reward {path!r}: {error}") from error
    if not callable(function):
        raise RewardError(f"reward {path!r}: must be a function, got a {type(function).__name__}.")
    return function


def is_judge(name: str) -> bool:
    """True for the name of a judge."""
    return re.fullmatch(JUDGES, name, re.ASCII) is not None


def correctness_threshold(function: RewardFunction) -> float | None:
    """The score above which a response is correct; None if the function does not decide that."""
    if function.correct_above is None and function.name in REWARDS:
        return REWARDS[function.name].correct_above
    return function.correct_above


def make_rule(function: RewardFunction) -> Any:
    """Build a built-in rule, or the settings of a judge; fast enough to validate recipes with.

    Raises: RewardError for a name outside REWARDS or parameters that the rule does not accept.
    """
    entry = REWARDS.get(JUDGE if is_judge(function.name) else function.name)
    if entry is None:
        raise RewardError(_unknown(function.name))
    try:
        return load_dotted(entry.make)(**function.parameters)
    except TypeError as error:
        raise RewardError(
            f"reward {function.name!r}: parameters must fit the rule, "
            f"got {dict(function.parameters)} ({error}). Remove or rename them."
        ) from error


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Write it as pkg.module:function."
    return f"reward: must be one of {', '.join(REWARDS)} or a dotted path, got {name!r}. {hint}"
