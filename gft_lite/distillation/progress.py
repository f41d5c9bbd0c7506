"""TODO: gft_lite/distillation/progress.py"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gft_lite.distillation.teachers import TeacherRequest, TeacherResponse, TeacherSettings


@dataclass(frozen=True, slots=True)
class Graded:
    """An answer and what the reward rule says of it."""

    answer: TeacherResponse
    reward: float
    verdict: str
    right: bool


@dataclass
class Distillation:
    """The answers so far, and what went wrong in this call."""

    asking: TeacherSettings
    questions: Sequence[TeacherRequest]
    graded: dict[str, Graded] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    asked_tokens: int = 0
    right: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def offered(self, number: int) -> tuple[list[Graded], Counter[str]]:
        """The answers that a problem's row gets, in the order of sampling, and what else came.

        Left out: an answer that was cut off, which would teach to stop in the middle, one
        without any text, and the repetition of one that is there.
        """
        first = number * self.asking.samples
        found: dict[str, Graded] = {}
        others: Counter[str] = Counter()
        for question in self.questions[first : first + self.asking.samples]:
            graded = self.graded.get(question.key)
            if graded is None:
                others["missing"] += 1
            elif graded.answer.finish_reason == "length":
                others["truncated"] += 1
            elif not graded.answer.text.strip():
                others["empty"] += 1
            elif graded.answer.text in found:
                others["duplicates"] += 1
            else:
                found[graded.answer.text] = graded
        return list(found.values()), others

    def add(self, graded: Mapping[str, Graded]) -> None:
        """Take further answers, whether asked for now or kept before."""
        self.graded |= graded
        self.right += sum(g.right for g in graded.values())
        self.prompt_tokens += sum(g.answer.prompt_tokens for g in graded.values())
        self.completion_tokens += sum(g.answer.completion_tokens for g in graded.values())

    def cost(self) -> float | None:
        """Dollars for all answers, None without a price."""
        price_in, price_out = self.asking.price_in, self.asking.price_out
        if price_in is None and price_out is None:
            return None
        spent = self.prompt_tokens * (price_in or 0) + self.completion_tokens * (price_out or 0)
        return spent / 1e6

    def summary(self) -> dict[str, Any]:
        """The figures of the whole data set, and the pace of this call."""
        rows = [self.offered(i) for i in range(len(self.questions) // self.asking.samples)]
        others = sum((other for _, other in rows), Counter[str]())
        seconds = time.perf_counter() - self.started
        return {
            "problems": len(rows),
            "wanted": len(self.questions),
            "asked": self.asked,
            "reused": len(self.graded) - self.asked + self.failures.total(),
            "answered": len(self.graded),
            "failed": self.failures.total(),
            "right": self.right,
            "acceptance": self.right / len(self.graded) if self.graded else None,
            "problems_without_right_answer": sum(not any(g.right for g in r) for r, _ in rows),
            "offered": sum(len(answers) for answers, _ in rows),
            **{name: others[name] for name in ("duplicates", "truncated", "empty")},
            "verdicts": dict(Counter(g.verdict for g in self.graded.values()).most_common()),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost(),
            "seconds": seconds,
            "tokens_per_second": self.asked_tokens / seconds,
        }
