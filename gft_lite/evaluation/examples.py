"""Examples of correct and wrong responses to the same problem, for examples.md."""

from __future__ import annotations

import html
import re
from typing import NamedTuple

from gft_lite.types import Group

_MAX_CHARACTERS = 1500


class Sample(NamedTuple):
    """One graded response of a model."""

    label: str
    text: str


class Examples:
    """Pairs of a correct and a wrong response to a problem, of different models if possible."""

    def __init__(self, per_benchmark: int = 3) -> None:
        self._count = per_benchmark
        self._problems: dict[tuple[str, str], tuple[str, str]] = {}
        self._correct: dict[tuple[str, str], Sample] = {}
        self._wrong: dict[tuple[str, str], Sample] = {}

    def add(self, benchmark: str, label: str, group: Group) -> None:
        """Add a model's graded responses to a problem."""
        problem = group.problem
        at = benchmark, problem.id
        self._problems[at] = problem.text, problem.answer or ""
        for correct, samples, others in (
            (True, self._correct, self._wrong),
            (False, self._wrong, self._correct),
        ):
            text = next((r.text for r in group if r.correct is correct), None)
            differ = at in samples and at in others and samples[at].label != others[at].label
            if text is not None and not differ:
                samples[at] = Sample(label, _shorten(text))

    def markdown(self) -> str:
        """The examples of every benchmark; pairs of different models come first."""
        both = [at for at in self._problems if at in self._correct and at in self._wrong]
        both.sort(key=lambda at: self._correct[at].label == self._wrong[at].label)
        lines = ["# Right and wrong answers", ""]
        for benchmark in dict.fromkeys(name for name, _ in self._problems):
            chosen = [at for at in both if at[0] == benchmark][: self._count]
            lines += [f"## {benchmark}", "", *(line for at in chosen for line in self._one(at))]
            lines += [] if chosen else ["No problem was answered both right and wrong.", ""]
        return "\n".join(lines)

    def _one(self, at: tuple[str, str]) -> list[str]:
        text, answer = self._problems[at]
        correct, wrong = self._correct[at], self._wrong[at]
        cells = "".join(f"<td><pre>{html.escape(s.text)}</pre></td>" for s in (correct, wrong))
        # A blank line would end the HTML block.
        cells = re.sub(r"\n\s*\n", "\n&nbsp;\n", cells)
        return [
            f"### {at[1]}", "", *(f"> {line}" for line in text.splitlines()), "",
            f"Answer: `{answer}`", "",
            f"<table><tr><th>right: {html.escape(correct.label)}</th>"
            f"<th>wrong: {html.escape(wrong.label)}</th></tr>",
            f"<tr>{cells}</tr></table>", "",
        ]  # fmt: skip


def _shorten(text: str) -> str:
    """The start and the end of a long text; the answer is at the end."""
    if len(text) <= _MAX_CHARACTERS:
        return text
    half = _MAX_CHARACTERS // 2
    return f"{text[:half]}\n[...]\n{text[-half:]}"
