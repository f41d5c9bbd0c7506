"""Gold answers against the demonstrations that come with them, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gft_lite.data.base import Unusable
from gft_lite.data.prompts import PromptFormat
from gft_lite.types import Group, Problem, Response, Source
from gft_lite.utils.errors import short_repr

CHECKED = 64  # problems that are graded


@dataclass(frozen=True, slots=True)
class GoldCheck:
    """How many problems' gold answers some demonstration of theirs matches, and one without."""

    checked: int
    matched: int
    unmatched: Problem | None = None

    def describe(self, field: str = "data") -> str | None:
        """A line for the log, with advice if most are unmatched; None if every one is matched."""
        if self.unmatched is None:
            return None
        line = (
            f"{field}.columns.answer: the demonstrations of {self.checked - self.matched} of "
            f"{self.checked} problems don't state the gold answer; for example problem "
            f"{self.unmatched.id}, gold answer {short_repr(self.unmatched.answer)}"
        )
        advice = "Check answer_from, the columns and reward.functions"
        return f"{line}. {advice}." if 2 * self.matched < self.checked else f"{line}."


def check_golds(
    problems: Sequence[Problem],
    format: PromptFormat,
    grade: Callable[[Sequence[Group]], list[Group]],
) -> GoldCheck:
    """Grade the demonstrations of the first problems that have a gold answer and demonstrations.

    Problems whose reward functions don't decide correctness are not counted.
    """
    groups: list[Group] = []
    for problem in problems:
        if len(groups) == CHECKED:
            break
        sources: list[Source] = ["expert"] * len(problem.experts)
        sources += ["teacher"] * len(problem.teachers)
        texts = [*problem.experts, *problem.teachers]
        made = (_demonstration(format, *pair) for pair in zip(texts, sources, strict=True))
        responses = tuple(response for response in made if response)
        if problem.answer is not None and responses:
            groups.append(Group(problem, responses))
    graded = [g for g in grade(groups) if any(r.correct is not None for r in g)]
    wrong = [g.problem for g in graded if not any(r.correct for r in g)]
    return GoldCheck(len(graded), len(graded) - len(wrong), wrong[0] if wrong else None)


def _demonstration(format: PromptFormat, text: str, source: Source) -> Response | None:
    try:
        return format.demonstration(text, source)
    except Unusable:
        return None
