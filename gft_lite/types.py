"""The frozen values that all packages exchange: Problem, Response, Group, ScoredGroup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Source = Literal["expert", "teacher", "self"]
# Sources as numbers: the index in this tuple.
SOURCES: tuple[Source, ...] = ("expert", "teacher", "self")
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
    `reward` is the reward rule's score, never an advantage; None before grading, and after it if no
    reward function applies. `reward_parts` are the unweighted scores of each reward function.
    `verdict` is the outcome of grading, None before it: "not_applicable", "ok", "no_answer" (none
    stated), "unparsed" (not readable as mathematics), "timeout" (grading was killed) or "error".
    `correct` is None before grading, and after it if no reward function decides correctness.
    """

    token_ids: tuple[int, ...]
    text: str
    source: Source
    finish_reason: FinishReason = "stop"
    logprobs: tuple[float, ...] | None = None
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    verdict: str | None = None
    correct: bool | None = None

    @property
    def truncated(self) -> bool:
        """True if a length limit ended the response."""
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
    def rewards(self) -> tuple[float | None, ...]:
        """The K rewards, None where no reward function applies.

        Raises: ValueError if a response has not been graded.
        """
        if any(r.reward is None and r.verdict is None for r in self.responses):
            raise ValueError(f"group {self.problem.id}: not every response has been graded")
        return tuple(r.reward for r in self.responses)

    @property
    def flat(self) -> bool:
        """True if all rewards are equal, so that every advantage is zero."""
        return len({reward for reward in self.rewards if reward is not None}) <= 1


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A graded group with the K advantages of its responses."""

    group: Group
    advantages: tuple[float, ...]

    def __iter__(self) -> Iterator[tuple[Response, float]]:
        return zip(self.group, self.advantages, strict=True)

    @property
    def success_share(self) -> float:
        """The share of the self samples that are right; 0 without self samples.

        Where no reward function decides correctness, a reward over 0.5 counts as right.
        """
        samples = [r for r in self.group if r.source == "self"]
        right = [(r.reward or 0.0) > 0.5 if r.correct is None else r.correct for r in samples]
        return sum(right) / len(right) if right else 0.0
