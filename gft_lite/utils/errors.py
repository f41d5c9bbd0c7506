"""The error types that reach the user, and helpers for their texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_SHOWN = 20  # Errors in one message; more would not fit a terminal.


class UserError(Exception):
    """The user's input is wrong (exit code 2); `problems` holds one text for each error."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        more = len(self.problems) - MAX_SHOWN
        lines = self.problems[:MAX_SHOWN] + ([f"... and {more} more errors."] if more > 0 else [])
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[str]]]:
        """Between processes an error is made again from `problems`, not from its text."""
        return type(self), (self.problems,)


class RecipeError(UserError):
    """A value of the recipe is wrong."""


class RewardError(ValueError):
    """An error in a reward function or its settings; the message names the function."""


def nearest(name: object, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most similar to `name`, None if none is similar."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def dotted_path(at: Sequence[str | int]) -> str:
    """The path of a recipe field as it is written on the command line: `optim.lr`."""
    return ".".join(map(str, at))


def short_repr(value: Any) -> str:
    """A value as one line of at most 60 characters, for an error text."""
    if isinstance(value, Mapping) or hasattr(value, "model_fields_set"):  # a pydantic model
        return "a section"
    plain = {None: "null", True: "true", False: "false"}
    try:
        text = plain[value] if value is None or isinstance(value, bool) else repr(value)
    except ValueError:  # Python does not convert integers of more than 4300 digits.
        text = "a very long number"
    return text if len(text) <= 60 else text[:57] + "..."
