"""The frozen values that all packages exchange: Problem, Response, Group, ScoredGroup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Source = Literal["expert", "teacher", "self"]
# Sources as numbers: the index in this tuple.
SOURCES: tuple[Source, ...] = ("expert", "teacher", "self")
# The reward over which a response is right, where no reward function decides that.
RIGHT_ABOVE = 0.5
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer and whatever demonstrations the data set has.

    `prompt_ids` is the rendered prompt (template or chat template applied), tokenised once.
    `columns` keeps the data set's remaining columns for user reward functions. Of a conversation,
    `text` is the last user turn, `history` the earlier (user, assistant) turns, and `system` its
    own system message. `success` is the share of right answers among those that were sampled before
    training, where `data.difficulty` reads it.
    """

    id: str
    text: str
    answer: str | None
    prompt_ids: tuple[int, ...] = ()
    experts: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    success: float | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The problem as chat messages, without the prompt settings of a recipe."""
        turns = [] if self.system is None else [("system", self.system)]
        turns += [turn for q, a in self.history for turn in (("user", q), ("assistant", a))]
        return [{"role": r, "content": t} for r, t in (*turns, ("user", self.text))]

    def to_json(self) -> dict[str, Any]:
        """What files record of a problem: a conversation's `system` and `history` if it has any."""
        own = {"id": self.id, "text": self.text, "answer": self.answer}
        earlier: dict[str, Any] = {"system": self.system, "history": [*map(list, self.history)]}
        return own | {name: value for name, value in earlier.items() if value}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Problem:
        """The problem of a file. Raises: KeyError, TypeError or ValueError if it is no problem."""
        history = tuple((str(q), str(a)) for q, a in entry.get("history", ()))
        given = entry["id"], entry["text"], entry["answer"]
        return cls(*given, history=history, system=entry.get("system"))


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a problem, as token ids from its producer and never re-tokenised.

    `token_ids` includes the end-of-sequence token when `finish_reason` is "stop" on it;
    `logprobs`, one per token id, are the rollout engine's, in nats, for self samples only.
    The first `prefix` tokens are a demonstration's, put before the sample; their log-probs are 0.
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
    prefix: int = 0

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
        """The share of the self samples that are right; 0 without self samples."""
        right = [self.is_right(r) for r in self.group if r.source == "self"]
        return sum(right) / len(right) if right else 0.0

    @staticmethod
    def is_right(response: Response) -> bool:
        """True if a response is right."""
        if response.correct is None:
            return (response.reward or 0.0) > RIGHT_ABOVE
        return response.correct
