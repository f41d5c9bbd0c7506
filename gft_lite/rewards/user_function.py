"""User-defined reward functions, which have the signature of TRL's reward functions."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import islice
from typing import Any

from gft_lite.rewards.base import Grade, RewardError, RewardFunction, check_magnitude
from gft_lite.rewards.registry import load_function
from gft_lite.types import Group, Response
from gft_lite.utils.user_code import user_errors_as

Rows = Sequence[tuple[Group, Response]]
_ARGUMENTS = ("prompts", "completions", "completion_ids", "answer")


class UserFunction:
    """A user's function, called in this process as
    `f(prompts=, completions=, completion_ids=, answer=, **columns, **parameters)`.

    It returns one number per completion, or None where it does not apply; it may be a coroutine
    function. `conversational`: prompts and completions are lists of messages, as in TRL.
    """

    def __init__(self, function: RewardFunction, *, conversational: bool) -> None:
        """Import the function.

        Raises: RewardError if it cannot be imported or does not accept its parameters.
        """
        self._name = function.name
        self._call = load_function(function.name)
        self._parameters = dict(function.parameters)
        self._conversational = conversational
        self._accepted = _accepted_names(self._call)
        for name in self._parameters:
            self._check_parameter(name)

    def grade(self, rows: Rows) -> list[Grade | None]:
        """The grade of each response, None where the function does not apply.

        Raises: RewardError if the function raises or returns anything else than such a list.
        """
        arguments = _trl_arguments(rows, self._conversational) | self._parameters
        if self._accepted is not None:
            arguments = {n: value for n, value in arguments.items() if n in self._accepted}
        with user_errors_as(self._raised):
            scores = self._call(**arguments)
            if inspect.isawaitable(scores):
                scores = _await(scores)
        return self._grades(scores, len(rows))

    def _grades(self, scores: Any, expected: int) -> list[Grade | None]:
        if not isinstance(scores, Iterable) or isinstance(scores, str | bytes | Mapping | Set):
            raise RewardError(
                f"reward {self._name!r}: must return a list of numbers or None, "
                f"got {type(scores).__name__}. Return one entry per completion."
            )
        with user_errors_as(self._raised):  # a generator runs here; it may never end
            entries = list(islice(scores, expected + 1))
        if len(entries) != expected:
            more = "more" if len(entries) > expected else str(len(entries))
            raise RewardError(
                f"reward {self._name!r}: must return one entry per completion ({expected}), "
                f"got {more}. Return None where it does not apply."
            )
        return [None if entry is None else Grade(self._number(entry)) for entry in entries]

    def _number(self, entry: Any) -> float:
        """A Python, NumPy or torch number as a float."""
        with user_errors_as(lambda _: self._no_number(entry)):  # __float__ is the user's code
            if isinstance(entry, str | bytes | bytearray):
                raise TypeError
            score = float(entry)
            if not math.isfinite(score):
                raise ValueError
        check_magnitude(f"reward {self._name!r}: entries", score)
        return score

    def _no_number(self, entry: Any) -> RewardError:
        return RewardError(
            f"reward {self._name!r}: entries must be finite numbers or None, "
            f"got {_safe_repr(entry)}. Return None where it does not apply."
        )

    def _raised(self, error: str) -> RewardError:
        return RewardError(f"reward {self._name!r}: must not raise, got {error}. Fix the function.")

    def _check_parameter(self, name: str) -> None:
        if name in _ARGUMENTS:
            raise RewardError(
                f"reward {self._name!r}: parameters must not be one of {', '.join(_ARGUMENTS)}, "
                f"got {name!r}. Rename it."
            )
        if self._accepted is not None and name not in self._accepted:
            close = difflib.get_close_matches(name, self._accepted, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Remove it."
            raise RewardError(
                f"reward {self._name!r}: parameters must be accepted by the function, "
                f"got {name!r}. {hint}"
            )


def _trl_arguments(rows: Rows, conversational: bool) -> dict[str, Any]:
    """The keyword arguments of TRL's reward functions, one list entry per completion."""
    names = {name for group, _ in rows for name in group.problem.columns}
    columns = {
        name: [group.problem.columns.get(name) for group, _ in rows]
        for name in sorted(names.difference(_ARGUMENTS))
    }
    prompts: list[Any] = [group.problem.text for group, _ in rows]
    completions: list[Any] = [response.text for _, response in rows]
    if conversational:
        prompts = [group.problem.messages for group, _ in rows]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    return {
        **columns,
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [list(response.token_ids) for _, response in rows],
        "answer": [group.problem.answer for group, _ in rows],
    }


def _accepted_names(call: Callable[..., Any]) -> set[str] | None:
    """The keyword names that a function accepts; None if it accepts any or has no signature."""
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


def _await(awaitable: Any) -> Any:
    """The result of an awaitable; in a thread of its own where an event loop runs (Jupyter)."""
    import asyncio  # slow to import, and rarely needed
    from concurrent.futures import ThreadPoolExecutor

    async def result() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(result())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, result()).result()


def _safe_repr(value: Any) -> str:
    """The repr of any object, on one short line."""
    try:
        text = " ".join(repr(value).split())
    except (Exception, SystemExit):  # their own __repr__, or an integer of over 4300 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
