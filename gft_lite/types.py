"""The frozen values that cross every boundary: Problem, Response, Group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Source = Literal["expert", "teacher", "self"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer and whatever demonstrations the data set has.

    `prompt_ids` is the rendered prompt (template or chat template applied), tokenised once.
    `columns` keeps the data set's remaining columns for user reward functions.
    """

    id: str
    text: str
    answer: str | None
    prompt_ids: tuple[int, ...] = ()
    experts: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a problem, as token ids from its producer and never re-tokenised.

    `token_ids` includes the end-of-sequence token when `finish_reason` is "stop" on it;
    `logprobs`, one per token id, are the rollout engine's, in nats, for self samples only.
    `reward` is what the reward rule gave, never overwritten by an advantage;
    `reward_parts` are the unweighted scores of each reward function;
    `verdict` says how the reward came about: "ok", "no_answer" (none stated), "unparsed" (not
    readable as mathematics), "timeout" (grading was killed) or "error".
    """

    token_ids: tuple[int, ...]
    text: str
    source: Source
    finish_reason: FinishReason = "stop"
    logprobs: tuple[float, ...] | None = None
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    verdict: str | None = None

    @property
    def truncated(self) -> bool:
        """Whether the response was cut off by a length limit."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Group:
    """A problem and its K responses: experts first, then teachers, then self samples."""

    problem: Problem
    responses: tuple[Response, ...]

    def __iter__(self) -> Iterator[Response]:
        return iter(self.responses)

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def rewards(self) -> tuple[float, ...]:
        """The K rewards. Raises: ValueError if a response has not been scored."""
        rewards = tuple(r.reward for r in self.responses if r.reward is not None)
        if len(rewards) != len(self.responses):
            raise ValueError(f"group {self.problem.id}: not every response has been scored")
        return rewards

    @property
    def flat(self) -> bool:
        """Whether all rewards are equal, so that every advantage is zero."""
        return len(set(self.rewards)) <= 1
