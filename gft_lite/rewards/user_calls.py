"""Users' reward functions as a run calls them: in another process, with limits and retries.

A function is called once with all responses, as in TRL; a coroutine function once for each group,
several at a time. A function that failed for a response is called again for it alone, so that one
response costs no other its grade. A function that fails for all of them ends the run.
"""

from __future__ import annotations

import random
import selectors
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from gft_lite.rewards.base import Grade, RewardError, RewardFunction
from gft_lite.rewards.user_function import ARGUMENTS, Entry, too_slow
from gft_lite.rewards.user_process import pack
from gft_lite.rewards.worker import START_SECONDS, Worker
from gft_lite.rewards.worker_process import WALL_FACTOR
from gft_lite.types import Group, Response

Rows = Sequence[tuple[Group, Response]]
#: After this many calls for one response each that all fail, no other response is tried.
_MAX_FAILURES = 8
#: A function that has graded nothing of this many groups in a row is broken.
_MAX_GROUPS = 3
#: The limit of a call grows with its responses up to this number of them.
_LIMITED_RESPONSES = 50
#: The least limit of the first calls of a process, in which functions load models.
_FIRST_CALL_SECONDS = 60.0


class UserCalls:
    """The users' functions of a scorer and the process that runs them; not thread-safe.

    `timeout` is in seconds for a response; a call may take `WALL_FACTOR` times that on the clock.
    `conversational`: prompts and completions are lists of messages, as in TRL. `failures` has the
    error texts of responses that have no grade, until it is emptied.
    """

    def __init__(
        self, functions: Sequence[RewardFunction], *, timeout: float, concurrency: int,
        conversational: bool,
    ) -> None:  # fmt: skip
        """Import the functions. Raises: RewardError for one that can't be imported."""
        self._names = [function.name for function in functions]
        setup = [(f.name, dict(f.parameters)) for f in functions]
        self._setup = pack({"functions": setup, "path": sys.path})
        self._timeout, self._concurrency = timeout, concurrency
        self._conversational = conversational
        self._worker: Worker | None = None
        self._first = True
        self._failed_groups = dict.fromkeys(self._names, _MAX_GROUPS)  # in a row
        self.failures: list[str] = []
        self._kinds: dict[str, tuple[bool, list[str] | None]] = {}
        if functions:
            self._start()

    def grade(self, name: str, rows: Rows) -> list[Grade | None]:
        """The grade of each response, None where the function does not apply.

        Raises: RewardError if the function fails for all of them, or returns no list of entries.
        """
        entries: dict[int, Entry] = {}
        is_async = self._kinds[name][0]
        parts = groupby(range(len(rows)), lambda i: id(rows[i][0]) if is_async else None)
        ended = self._call(name, rows, [list(part) for _, part in parts], entries)
        failed = [i for i in entries if isinstance(entries[i], tuple)]
        if is_async and failed:
            ended = self._call(name, rows, [[i] for i in failed], entries)
        if ended or not is_async:
            self._call_alone(name, rows, failed, entries)
        failures = [entry for entry in entries.values() if isinstance(entry, tuple)]
        groups = len({id(group) for group, _ in rows})
        if len(failures) < len(rows):
            self._failed_groups[name] = 0
        elif (total := self._failed_groups[name] + groups) >= _MAX_GROUPS:
            raise RewardError(failures[0][0])
        else:
            self._failed_groups[name] = total
        self.failures += [text for text, _ in failures]
        return [_grade(entries[i]) for i in range(len(rows))]

    def close(self) -> None:
        """Stop the process; a later call starts a new one."""
        if self._worker is not None:
            self._stop(kill=False)

    def _call_alone(
        self, name: str, rows: Rows, failed: Sequence[int], entries: dict[int, Entry]
    ) -> None:
        """Call a function for one response after another, in an order that mixes groups."""
        order = random.Random(0).sample(failed, len(failed))
        for count, i in enumerate(order, start=1):
            if len(rows) > 1:
                self._call(name, rows, [[i]], entries)
            if count == _MAX_FAILURES and all(isinstance(e, tuple) for e in entries.values()):
                return

    def _call(
        self, name: str, rows: Rows, calls: Sequence[Sequence[int]], entries: dict[int, Entry]
    ) -> bool:
        """Call a function, and enter what it gave for each response; True if the process ended."""
        accepted = self._kinds[name][1]
        sent, limits = [], []
        for call in calls:
            arguments = _arguments([rows[i] for i in call], self._conversational)
            if accepted is not None:
                arguments = {n: value for n, value in arguments.items() if n in accepted}
            seconds = WALL_FACTOR * self._timeout * min(len(call), _LIMITED_RESPONSES)
            limits.append(max(seconds, _FIRST_CALL_SECONDS) if self._first else seconds)
            sent.append((arguments, len(call), limits[-1]))
        # No better limit for all calls than that of one after another in each slot.
        seconds = max(limits) * -(-len(calls) // self._concurrency)
        reply = self._ask(
            {"function": self._names.index(name), "calls": sent, "seconds": seconds + 1,
             "concurrency": self._concurrency}
        )  # fmt: skip
        if "error" in reply:
            raise RewardError(reply["error"])
        for k, call in enumerate(calls):
            found = reply["entries"][k] if "entries" in reply else None
            for j, i in enumerate(call):
                if found is not None:
                    entries[i] = tuple(found[j]) if isinstance(found[j], list) else found[j]
                elif reply["code"] is None:
                    entries[i] = too_slow(name, limits[k], len(call))
                else:
                    entries[i] = _ended(name, reply["code"])
        return "entries" not in reply

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The reply of the process, or the exit code with which it ended, None for a late one."""
        message = pack(request)
        if self._worker is not None and self._worker.process.poll() is not None:
            self._stop()
        worker = self._worker or self._start()
        worker.send(message)
        self._first = False
        try:
            late = not _has_reply(worker, request["seconds"])
            reply = None if late else worker.receive()
        except BaseException:
            self._stop()  # its reply must not be read as that of the next request
            raise
        if reply is None:
            code = self._stop(kill=late)
            return {"code": None if late else code}
        return reply

    def _start(self) -> Worker:
        """Start the process. Raises: RewardError for a function that can't be imported."""
        worker = Worker("user_process", self._setup)
        reply = worker.receive() if _has_reply(worker, START_SECONDS) else None
        if reply is None:
            code = worker.end()
            raise RewardError(
                f"reward {self._names[0]!r}: must be importable in a process of its own, which "
                f"ended with exit code {code}. Look at the lines above."
            )
        if "error" in reply:
            worker.end()
            raise RewardError(reply["error"])
        self._kinds = dict(zip(self._names, reply["functions"], strict=True))
        self._worker, self._first = worker, True
        return worker

    def _stop(self, kill: bool = True) -> int:
        """End the process and return its exit code."""
        assert self._worker is not None
        worker, self._worker = self._worker, None
        return worker.end(kill)


def _has_reply(worker: Worker, seconds: float) -> bool:
    """Wait for a reply or the end of the process; False after the time limit."""
    assert worker.process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(worker.process.stdout, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _grade(entry: Entry) -> Grade | None:
    if isinstance(entry, tuple):
        return Grade(None, entry[1])
    return None if entry is None else Grade(entry)


def _ended(name: str, code: int) -> Entry:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    rule = f"reward {name!r}: must not end the process that it runs in, got {how}"
    return f"{rule}. Fix the function.", "error"


def _arguments(rows: Rows, conversational: bool) -> dict[str, Any]:
    """The keyword arguments of TRL's reward functions, one list entry per completion."""
    names = {name for group, _ in rows for name in group.problem.columns}
    columns = {
        name: [group.problem.columns.get(name) for group, _ in rows]
        for name in sorted(names.difference(ARGUMENTS))
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
