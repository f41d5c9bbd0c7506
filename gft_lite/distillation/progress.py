"""State of a distillation: graded teacher responses, failures, counts and cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gft_lite.distillation.teachers import TeacherRequest, TeacherResponse, TeacherSettings
from gft_lite.utils.chat_model import price_of

# The verdict on a response that cannot follow the recipe's prompt, such as one with an end token
# of the policy inside its text.
UNUSABLE = "unusable"


@dataclass(frozen=True, slots=True)
class GradedResponse:
    """A teacher response with its grade.

    `reward` is None if no reward function applies, `right` if none decides correctness.
    """

    response: TeacherResponse
    reward: float | None
    verdict: str
    right: bool | None


@dataclass
class Distillation:
    """All graded responses by request key, and the failures of this call of the command.

    `asked` and `asked_tokens` count requests and completion tokens of this call, the other
    counts include responses from the answer store.
    """

    settings: TeacherSettings
    requests: Sequence[TeacherRequest]
    graded: dict[str, GradedResponse] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    asked_tokens: int = 0
    _right: int = 0
    _judged: int = 0
    _reward_sum: float = 0.0
    _rewards: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def demonstrations(self, index: int) -> tuple[list[GradedResponse], Counter[str]]:
        """The responses for the row of problem `index`, in sampling order, and the rest by reason.

        Left out: truncated responses, which would teach the policy to stop in the middle, empty
        and unusable ones, and duplicates.
        """
        first = index * self.settings.samples
        by_text: dict[str, GradedResponse] = {}
        left_out: Counter[str] = Counter()
        for request in self.requests[first : first + self.settings.samples]:
            graded = self.graded.get(request.key)
            if graded is None:
                left_out["missing"] += 1
            elif graded.response.finish_reason == "length":
                left_out["truncated"] += 1
            elif not graded.response.text.strip():
                left_out["empty"] += 1
            elif graded.verdict == UNUSABLE:
                left_out[UNUSABLE] += 1
            elif graded.response.text in by_text:
                left_out["duplicates"] += 1
            else:
                by_text[graded.response.text] = graded
        return list(by_text.values()), left_out

    def add(self, graded: Mapping[str, GradedResponse]) -> None:
        """Add graded responses, whether new or from the answer store."""
        self.graded |= graded
        judged = [g.right for g in graded.values() if g.right is not None]
        rewards = [g.reward for g in graded.values() if g.reward is not None]
        self._right += sum(judged)
        self._judged += len(judged)
        self._reward_sum += sum(rewards)
        self._rewards += len(rewards)
        self.prompt_tokens += sum(g.response.prompt_tokens for g in graded.values())
        self.completion_tokens += sum(g.response.completion_tokens for g in graded.values())

    @property
    def right(self) -> int | None:
        """The number of correct responses, None if no reward function decides correctness."""
        return None if self.graded and not self._judged else self._right

    def mean_reward(self) -> float | None:
        """The mean of the rewards, None if there are none."""
        return self._reward_sum / self._rewards if self._rewards else None

    def cost(self) -> float | None:
        """The price of all responses in dollars, None if no price is set."""
        prices = self.settings.price_in, self.settings.price_out
        return price_of(self.prompt_tokens, self.completion_tokens, *prices)

    def summary(self) -> dict[str, Any]:
        """Counts over the whole data set and the throughput of this call, for `summary.json`."""
        rows = [self.demonstrations(i) for i in range(len(self.requests) // self.settings.samples)]
        left_out = sum((reasons for _, reasons in rows), Counter[str]())
        right, seconds = self.right, time.perf_counter() - self.started
        return {
            "problems": len(rows),
            "wanted": len(self.requests),
            "asked": self.asked,
            "reused": len(self.graded) - self.asked + self.failures.total(),
            "answered": len(self.graded),
            "failed": self.failures.total(),
            "right": right,
            "acceptance": right / len(self.graded) if right is not None and self.graded else None,
            "mean_reward": self.mean_reward(),
            "problems_without_right_answer": (
                None if right is None else sum(not any(g.right for g in r) for r, _ in rows)
            ),
            "offered": sum(len(responses) for responses, _ in rows),
            **{name: left_out[name] for name in ("duplicates", "truncated", "empty", UNUSABLE)},
            "verdicts": dict(Counter(g.verdict for g in self.graded.values()).most_common()),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost(),
            "seconds": seconds,
            "tokens_per_second": self.asked_tokens / seconds,
        }
