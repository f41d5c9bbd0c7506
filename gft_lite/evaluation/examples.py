"""TODO: gft_lite/evaluation/examples.py"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

_SHOWN_CHARACTERS = 1500


class Sample(NamedTuple):
    """One graded response, as an example shows it."""

    label: str
    text: str


class Examples:
    """A right and a wrong response to the same problem, of different models where there are any."""

    def __init__(self, per_benchmark: int = 3) -> None:
        self._count = per_benchmark
        self._problems: dict[tuple[str, str], tuple[str, str]] = {}
        self._right: dict[tuple[str, str], Sample] = {}
        self._wrong: dict[tuple[str, str], Sample] = {}

    def see(
        self, benchmark: str, problem: tuple[str, str, str], label: str,
        graded: Sequence[tuple[str, bool]],
    ) -> None:  # fmt: skip
        """Note a model's responses `(text, right)` to the problem `(id, text, answer)`."""
        at = benchmark, problem[0]
        self._problems[at] = problem[1:]
        for wanted, seen, other in (
            (True, self._right, self._wrong),
            (False, self._wrong, self._right),
        ):
            text = next((text for text, right in graded if right is wanted), None)
            alone = at in seen and at in other and seen[at].label != other[at].label
            if text is not None and not alone:
                seen[at] = Sample(label, _shortened(text))

    def markdown(self) -> str:
        """The examples of every benchmark, those first in which models differ."""
        both = [at for at in self._problems if at in self._right and at in self._wrong]
        both.sort(key=lambda at: self._right[at].label == self._wrong[at].label)
        lines = ["# Right and wrong answers", ""]
        for benchmark in dict.fromkeys(name for name, _ in self._problems):
            chosen = [at for at in both if at[0] == benchmark][: self._count]
            lines += [f"## {benchmark}", "", *(line for at in chosen for line in self._one(at))]
            lines += [] if chosen else ["No problem was answered both right and wrong.", ""]
        return "\n".join(lines)

    def _one(self, at: tuple[str, str]) -> list[str]:
        text, answer = self._problems[at]
        right, wrong = self._right[at], self._wrong[at]
        cells = "".join(f"<td><pre>{html.escape(s.text)}</pre></td>" for s in (right, wrong))
        # A blank line would end the HTML.
        cells = re.sub(r"\n\s*\n", "\n&nbsp;\n", cells)
        return [
            f"### {at[1]}", "", *(f"> {line}" for line in text.splitlines()), "",
            f"Answer: `{answer}`", "",
            f"<table><tr><th>right: {html.escape(right.label)}</th>"
            f"<th>wrong: {html.escape(wrong.label)}</th></tr>",
            f"<tr>{cells}</tr></table>", "",
        ]  # fmt: skip


def _shortened(text: str) -> str:
    """The start and the end of a long text; the answer stands at the end."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[...]\n{text[-half:]}"
