"""User-defined reward functions, which have the signature of TRL's reward functions.

They are called in a process of their own (`user_process.py`), which `user_calls.py` starts.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cache
from itertools import islice
from typing import Any

from gft_lite.rewards.base import RewardError, RewardFunction, check_magnitude
from gft_lite.rewards.registry import load_function
from gft_lite.utils.user_code import error_text, user_errors_as

#: The arguments that are not columns of the data.
ARGUMENTS = ("prompts", "completions", "completion_ids", "answer")

Arguments = Mapping[str, Any]
#: What a function gave for a response: a score, None where it does not apply, or after a failure
#: the error text and the verdict.
Entry = float | None | tuple[str, str]


class UserFunction:
    """A user's function, `f(prompts=, completions=, completion_ids=, answer=, **columns,
    **parameters)`.

    It returns one number per completion, or None where it does not apply; it may be a coroutine
    function. `accepted` are its keyword names, None if it accepts any.
    """

    def __init__(self, function: RewardFunction) -> None:
        """Import the function.

        Raises: RewardError if it cannot be imported or does not accept its parameters.
        """
        self._name = function.name
        self._call = load_function(function.name)
        self._parameters = dict(function.parameters)
        self.accepted = _accepted_names(self._call)
        calls = self._call, type(self._call).__call__
        self.is_async = any(map(inspect.iscoroutinefunction, calls))
        for name in self._parameters:
            self._check_parameter(name)

    def call(self, arguments: Arguments, responses: int) -> list[Entry]:
        """Call the function once.

        Raises: RewardError if it returns anything else than an entry for each of the responses.
        """
        try:
            with user_errors_as(RuntimeError):
                scores = self._call(**arguments, **self._parameters)
                if inspect.isawaitable(scores):
                    scores = _runner().run(_result(scores))
        except RuntimeError as error:
            return [self._raised(str(error))] * responses
        return self._entries(scores, responses)

    def call_concurrently(
        self, calls: Sequence[tuple[Arguments, int, float]], concurrency: int
    ) -> list[list[Entry]]:
        """Await several calls of a coroutine function, at most `concurrency` at a time.

        Each has its arguments, its number of responses and its limit in seconds.
        Raises: RewardError as `call` does.
        """

        async def run() -> list[list[Entry]]:
            slots = asyncio.Semaphore(concurrency)
            return await asyncio.gather(*(self._await(slots, *call) for call in calls))

        return _runner().run(run())

    async def _await(
        self, slots: asyncio.Semaphore, arguments: Arguments, responses: int, seconds: float
    ) -> list[Entry]:
        async with slots:
            limit = asyncio.timeout(seconds)
            try:
                async with limit:
                    scores = await self._call(**arguments, **self._parameters)
            except BaseException as error:  # SystemExit, too, would end the event loop
                if limit.expired():
                    return [too_slow(self._name, seconds, responses)] * responses
                return [self._raised(error_text(error))] * responses
        return self._entries(scores, responses)

    def _entries(self, scores: Any, expected: int) -> list[Entry]:
        if not isinstance(scores, Iterable) or isinstance(scores, str | bytes | Mapping | Set):
            raise RewardError(
                f"reward {self._name!r}: must return a list of numbers or None, "
                f"got {type(scores).__name__}. Return one entry per completion."
            )
        try:
            with user_errors_as(RuntimeError):  # a generator runs here; it may never end
                entries = list(islice(scores, expected + 1))
        except RuntimeError as error:
            return [self._raised(str(error))] * expected
        if len(entries) != expected:
            more = "more" if len(entries) > expected else str(len(entries))
            raise RewardError(
                f"reward {self._name!r}: must return one entry per completion ({expected}), "
                f"got {more}. Return None where it does not apply."
            )
        return [None if entry is None else self._number(entry) for entry in entries]

    def _number(self, entry: Any) -> Entry:
        """A Python, NumPy or torch number as a float; anything else is a failure."""
        try:
            with user_errors_as(RewardError):  # __float__ is the user's code
                if isinstance(entry, str | bytes | bytearray):
                    raise TypeError
                score = float(entry)
                if not math.isfinite(score):
                    raise ValueError
        except RewardError:
            rule = f"reward {self._name!r}: entries must be finite numbers or None"
            return f"{rule}, got {_safe_repr(entry)}. Return None where it does not apply.", "error"
        try:
            check_magnitude(f"reward {self._name!r}: entries", score)
        except RewardError as error:
            return str(error), "error"
        return score

    def _raised(self, error: str) -> Entry:
        return f"reward {self._name!r}: must not raise, got {error}. Fix the function.", "error"

    def _check_parameter(self, name: str) -> None:
        if name in ARGUMENTS:
            raise RewardError(
                f"reward {self._name!r}: parameters must not be one of {', '.join(ARGUMENTS)}, "
                f"got {name!r}. Rename it."
            )
        if self.accepted is not None and name not in self.accepted:
            close = difflib.get_close_matches(name, self.accepted, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Remove it."
            raise RewardError(
                f"reward {self._name!r}: parameters must be accepted by the function, "
                f"got {name!r}. {hint}"
            )


def too_slow(name: str, seconds: float, responses: int) -> Entry:
    """The failure of a call that did not end in time."""
    rule = f"reward {name!r}: must return within {seconds:g} s for {responses} responses"
    return f"{rule}, got nothing. Raise reward.timeout, or fix the function.", "timeout"


def _accepted_names(call: Callable[..., Any]) -> set[str] | None:
    """The keyword names that a function accepts; None if it accepts any or has no signature."""
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


@cache
def _runner() -> asyncio.Runner:
    """One event loop for all calls, as the connections of a client belong to its loop."""
    return asyncio.Runner()


async def _result(awaitable: Any) -> Any:
    return await awaitable


def _safe_repr(value: Any) -> str:
    """The repr of any object, on one short line."""
    try:
        text = " ".join(repr(value).split())
    except (Exception, SystemExit):  # their own __repr__, or an integer of over 4300 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
