"""Score groups: every response by every reward function, whatever its source."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from types import TracebackType
from typing import Any

from gft_lite.rewards.base import VERDICTS, Grade, RewardError, RewardFunction, Rule
from gft_lite.rewards.registry import REWARDS, load_function, make_rule
from gft_lite.rewards.worker_pool import WorkerPool
from gft_lite.types import Group, Response

_CACHED_GRADES = 200_000
_RESERVED = ("prompts", "completions", "completion_ids")


class Scorer:
    """Reward functions with their worker processes; use as a context manager, or call `close`.

    A name in REWARDS is a built-in rule; any other is a dotted path to a user's function with
    TRL's signature, called in this process as `f(prompts=, completions=, completion_ids=,
    answer=, **columns, **parameters) -> list[float | None]`; None means not applicable.
    `conversational` hands it message lists, as TRL does for chat data. `timeout` is the CPU
    seconds that one text may take in one of the `workers`, so that load changes no reward.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        workers: int = 2,
        timeout: float = 3.0,
        conversational: bool = False,
    ) -> None:
        """Build the rules and load the functions; worker processes start with the first batch.

        Raises: RewardError for an unknown name, a repeated one, bad parameters or limits.
        """
        _check(functions, workers, timeout)
        self._functions = tuple(functions)
        self._conversational = conversational
        self._rules: dict[str, Rule] = {}
        self._users: dict[str, Callable[..., Any]] = {}
        for function in functions:
            if function.name in REWARDS or not set(".:") & set(function.name):
                self._rules[function.name] = make_rule(function)
            else:
                self._users[function.name] = load_function(function.name)
        remote = [f for f in functions if f.name in REWARDS and REWARDS[f.name].in_worker]
        self._remote = {f.name: index for index, f in enumerate(remote)}
        self._pool = WorkerPool(
            [(f.name, dict(f.parameters)) for f in remote], workers=workers, timeout=timeout
        )
        self._cache: dict[bytes, Grade] = {}
        self._lock = threading.Lock()

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """New groups whose responses have `reward`, `reward_parts` and `verdict`.

        `reward` is the weighted sum of the parts that apply (0 if none does), `verdict` the
        gravest of any part. Raises: RewardError if a user's function misbehaves.
        """
        rows = [(group, response) for group in groups for response in group.responses]
        if not rows:
            return list(groups)
        with self._lock:
            columns = [self._grades(function, rows) for function in self._functions]
        graded = zip((response for _, response in rows), zip(*columns, strict=True), strict=True)
        scored = iter([self._combine(response, grades) for response, grades in graded])
        return [
            replace(group, responses=tuple(next(scored) for _ in group.responses))
            for group in groups
        ]

    def close(self) -> None:
        """Stop the worker processes."""
        self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _combine(self, response: Response, grades: Sequence[Grade | None]) -> Response:
        parts = {
            function.name: grade.score
            for function, grade in zip(self._functions, grades, strict=True)
            if grade is not None
        }
        weights = {function.name: function.weight for function in self._functions}
        verdicts = [grade.verdict for grade in grades if grade is not None]
        return replace(
            response,
            reward=float(sum(weights[name] * score for name, score in parts.items())),
            reward_parts=parts,
            verdict=max(verdicts, key=VERDICTS.index, default="ok"),
        )

    def _grades(
        self, function: RewardFunction, rows: Sequence[tuple[Group, Response]]
    ) -> Sequence[Grade | None]:
        if function.name in self._users:
            return self._call_user(function, rows)
        items = [(r.text, g.problem.answer, _answer_type(g)) for g, r in rows]
        if function.name not in self._remote:
            return [self._rules[function.name](*item) for item in items]
        return self._grade_remotely(self._remote[function.name], items)

    def _grade_remotely(self, index: int, items: Sequence[tuple[Any, ...]]) -> list[Grade]:
        """Grade each distinct item once; demonstrations recur, so their grades are kept."""
        payloads = [json.dumps([index, *item]).encode() for item in items]
        keys = [hashlib.blake2b(payload, digest_size=16).digest() for payload in payloads]
        known = {key: self._cache[key] for key in keys if key in self._cache}
        new = {key: p for key, p in zip(keys, payloads, strict=True) if key not in known}
        fresh = dict(zip(new, self._pool.run(list(new.values())), strict=True))
        # a time-out or a crash may be the machine's fault; the next epoch tries again
        lasting = {k: g for k, g in fresh.items() if g.verdict not in ("timeout", "error")}
        if len(self._cache) + len(lasting) > _CACHED_GRADES:
            self._cache.clear()
        self._cache.update(lasting)
        graded = known | fresh
        return [graded[key] for key in keys]

    def _call_user(
        self, function: RewardFunction, rows: Sequence[tuple[Group, Response]]
    ) -> list[Grade | None]:
        call = self._users[function.name]
        arguments = self._trl_arguments(rows) | dict(function.parameters)
        accepted = _accepted(call)
        if accepted is not None:
            arguments = {name: value for name, value in arguments.items() if name in accepted}
        try:
            scores = call(**arguments)
        except Exception as error:
            raise RewardError(
                f"reward {function.name!r}: must not raise, "
                f"got {type(error).__name__}: {error}. Fix the function."
            ) from error
        return list(_checked(function.name, scores, len(rows)))

    def _trl_arguments(self, rows: Sequence[tuple[Group, Response]]) -> dict[str, list[Any]]:
        """The keyword arguments of TRL's reward functions, one list entry per completion."""
        names = {name for group, _ in rows for name in group.problem.columns}
        columns = {
            name: [group.problem.columns.get(name) for group, _ in rows]
            for name in sorted(names.difference(_RESERVED))
        }
        prompts: list[Any] = [group.problem.text for group, _ in rows]
        completions: list[Any] = [response.text for _, response in rows]
        if self._conversational:
            prompts = [[{"role": "user", "content": text}] for text in prompts]
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        return {
            **columns,
            "answer": [group.problem.answer for group, _ in rows],
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [list(response.token_ids) for _, response in rows],
        }


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


def _accepted(call: Callable[..., Any]) -> set[str] | None:
    """The keyword names a function takes, or None if it takes any or does not tell."""
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


def _checked(name: str, scores: Any, expected: int) -> Iterator[Grade | None]:
    if not isinstance(scores, list | tuple):
        raise RewardError(
            f"reward {name!r}: must return a list of numbers or None, "
            f"got {type(scores).__name__}. Return one entry per completion."
        )
    if len(scores) != expected:
        raise RewardError(
            f"reward {name!r}: must return one entry per completion ({expected}), "
            f"got {len(scores)}. Return None where it does not apply."
        )
    for score in scores:
        if score is None:
            yield None
        elif isinstance(score, Real) and math.isfinite(score):
            yield Grade(float(score))
        else:
            raise RewardError(
                f"reward {name!r}: entries must be finite numbers or None, got {score!r}. "
                "Return None where it does not apply."
            )
