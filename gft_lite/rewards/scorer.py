"""Scoring of groups: every response, from any source, by every reward function."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from gft_lite.rewards.base import (
    VERDICTS,
    Grade,
    RewardError,
    RewardFunction,
    Rule,
    check_magnitude,
)
from gft_lite.rewards.judge import JudgeSettings
from gft_lite.rewards.judge_client import Judges
from gft_lite.rewards.registry import REWARDS, correctness_threshold, is_judge, make_rule
from gft_lite.rewards.user_calls import Rows, UserCalls
from gft_lite.rewards.worker_pool import WorkerPool
from gft_lite.types import Group, Response

_CACHED_GRADES = 200_000


class Scorer:
    """Reward functions with their worker processes; a context manager, or call `close`.

    A name in REWARDS is a built-in rule, graded in one of the `workers`; any other name is the
    dotted path of a user's function, called in a process of its own (see `user_calls.py`).
    `timeout` is the CPU time that one text may take in a worker, in seconds; CPU time, so that
    load does not change rewards. `concurrency` limits the calls of a coroutine function that run
    at a time. `conversational`: users' functions get lists of messages. `log` gets a line
    about the responses of a batch for which a function failed. `judge` has the clients of the
    judges, if any are among the functions.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        workers: int = 2,
        timeout: float = 3.0,
        concurrency: int = 8,
        conversational: bool = False,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """Build the rules and import the functions; the workers start with the first batch.

        Raises: RewardError for an unknown or repeated name, or wrong parameters or limits.
        """
        _check(functions, workers, timeout)
        self._functions = tuple(functions)
        self._rules: dict[str, Rule] = {}
        self.judge: Judges | None = None
        users: list[RewardFunction] = []
        judged: dict[str, JudgeSettings] = {}
        for function in functions:
            if is_judge(function.name):
                judged[function.name] = make_rule(function)
            elif function.name in REWARDS or not set(".:") & set(function.name):
                self._rules[function.name] = make_rule(function)
            else:
                users.append(function)
        self._users = UserCalls(
            users, timeout=timeout, concurrency=concurrency, conversational=conversational
        )
        remote = [f for f in functions if f.name in REWARDS and REWARDS[f.name].in_worker]
        self._remote = {f.name: index for index, f in enumerate(remote)}
        self._pool = WorkerPool(
            [(f.name, dict(f.parameters)) for f in remote], workers=workers, timeout=timeout
        )
        self._cache: dict[bytes, Grade] = {}
        self._log = log or (lambda _: None)
        if judged:  # The last step, as it sends a request to each.
            self.judge = Judges(judged, concurrency=concurrency, log=self._log)
        self._lock = threading.Lock()

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """New groups whose responses have `reward`, `reward_parts`, `verdict` and `correct`.

        `reward` is the weighted sum of the parts that apply, None if none does, or if a function
        failed; `verdict` is the most severe one of the parts; `correct` is decided by the first
        function that has a threshold of correctness, and is None without any.

        Raises: RewardError if a user's function fails for all responses.
        """
        rows = [(group, response) for group in groups for response in group.responses]
        if not rows:
            return list(groups)
        with self._lock:
            columns = [self._grades(function, rows) for function in self._functions]
            failures = self._take_failures()
        if failures:
            self._log(f"{failures[0]} {len(failures)} of {len(rows)} responses have no reward.")
        graded = zip((response for _, response in rows), zip(*columns, strict=True), strict=True)
        scored = iter([self._combine(response, grades) for response, grades in graded])
        return [
            replace(group, responses=tuple(next(scored) for _ in group.responses))
            for group in groups
        ]

    def close(self) -> None:
        """Stop the worker processes."""
        self._pool.close()
        self._users.close()
        if self.judge is not None:
            self.judge.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take_failures(self) -> list[str]:
        """The error texts of the responses that a function has failed for since the last call."""
        found: list[str] = []
        for grader in (self._users, *(self.judge.by_name.values() if self.judge else ())):
            found += grader.failures
            grader.failures = []
        return found

    def _combine(self, response: Response, grades: Sequence[Grade | None]) -> Response:
        applied = [
            (function, grade)
            for function, grade in zip(self._functions, grades, strict=True)
            if grade is not None
        ]
        parts = {f.name: grade.score for f, grade in applied if grade.score is not None}
        # without all of its parts, a reward can't be compared with those of the group
        complete = bool(parts) and len(parts) == len(applied)
        reward = float(sum(f.weight * parts[f.name] for f in self._functions if f.name in parts))
        check_magnitude("rewards: the weighted sum", reward)
        verdicts = [grade.verdict for _, grade in applied]
        return replace(
            response,
            reward=reward if complete else None,
            reward_parts=parts,
            verdict=max(verdicts, key=VERDICTS.index, default="not_applicable"),
            correct=self._is_correct(grades),
        )

    def _is_correct(self, grades: Sequence[Grade | None]) -> bool | None:
        for function, grade in zip(self._functions, grades, strict=True):
            threshold = correctness_threshold(function)
            if threshold is not None:
                if grade is None and function.name in REWARDS:
                    return None  # There is no answer to compare with.
                return grade is not None and grade.score is not None and grade.score > threshold
        return None

    def _grades(self, function: RewardFunction, rows: Rows) -> Sequence[Grade | None]:
        if is_judge(function.name):
            assert self.judge is not None
            return self.judge.by_name[function.name].grade(rows)
        if function.name not in self._rules:
            return self._users.grade(function.name, rows)
        items = [(r.text, g.problem.answer, _answer_type(g)) for g, r in rows]
        needy = REWARDS[function.name].needs_answer
        known = [item for item in items if item[1] is not None or not needy]
        if function.name not in self._remote:
            graded: Sequence[Grade] = [self._rules[function.name](*item) for item in known]
        else:
            graded = self._grade_remotely(self._remote[function.name], known)
        grades = iter(graded)
        return [None if needy and item[1] is None else next(grades) for item in items]

    def _grade_remotely(self, index: int, items: Sequence[tuple[Any, ...]]) -> list[Grade]:
        """Grade each distinct item once and keep its grade, since demonstrations recur."""
        payloads = [json.dumps([index, *item]).encode() for item in items]
        keys = [hashlib.blake2b(payload, digest_size=16).digest() for payload in payloads]
        known = {key: self._cache[key] for key in keys if key in self._cache}
        new = {key: p for key, p in zip(keys, payloads, strict=True) if key not in known}
        fresh = dict(zip(new, self._pool.run(list(new.values())), strict=True))
        # a timeout or a crash may be due to the machine: the next epoch tries again
        lasting = {k: g for k, g in fresh.items() if g.verdict not in ("timeout", "error")}
        if len(self._cache) + len(lasting) > _CACHED_GRADES:
            self._cache.clear()
        self._cache.update(lasting)
        graded = known | fresh
        return [graded[key] for key in keys]


def _check(functions: Sequence[RewardFunction], workers: int, timeout: float) -> None:
    names = [function.name for function in functions]
    if not names:
        raise RewardError(
            f"rewards: must name at least one function, got none. Choose from {', '.join(REWARDS)}."
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RewardError(
            f"rewards: each function may appear once, got {repeated[0]!r} twice. "
            "Merge their weights or patterns."
        )
    if workers < 1:
        raise RewardError(f"reward workers: must be at least 1, got {workers}. Use 2.")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise RewardError(f"reward timeout: must be positive seconds, got {timeout}. Use 3.")
    for function in functions:
        if not math.isfinite(function.weight):
            raise RewardError(
                f"reward {function.name!r}: weight must be finite, got {function.weight}. Use 1.0."
            )


def _answer_type(group: Group) -> str | None:
    kind = group.problem.columns.get("answer_type")
    return kind if isinstance(kind, str) else None
