"""What kind of answers a column holds, which decides how they can be graded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gft_lite.rewards.extract import boxed_answer
from gft_lite.rewards.numeric import number

# `hash` and `boxed` are worked solutions that end with their answer.
Kind = Literal["hash", "boxed", "letter", "math", "text", "free", "none"]
MOST, HALF = 0.9, 0.5
_LETTER = re.compile(r"\(?[A-Z]\)?\.?")
_FORMULA = re.compile(r"[\\^=<>]|\d")
SHORT_CHARS, SHORT_WORDS, FORMULA_CHARS = 40, 6, 80


@dataclass(frozen=True, slots=True)
class AnswerKind:
    """The kind of a column's answers, the reason, and a doubt if the values differ in kind."""

    kind: Kind
    reason: str
    doubt: str = ""

    @property
    def is_solution(self) -> bool:
        """True for worked solutions, which are demonstrations too."""
        return self.kind in ("hash", "boxed", "free")


def answer_kind(values: Sequence[Any]) -> AnswerKind:
    """The kind of the values of a column that aren't null."""
    if not values or any(isinstance(value, bool) for value in values):
        return AnswerKind("none", "true or false" if values else "empty")
    if all(isinstance(value, int | float) for value in values):
        return AnswerKind("math", f"all {len(values)} are numbers")
    texts = [str(value).strip() for value in values if isinstance(value, str | int | float)]
    if len(texts) < MOST * len(values):
        return AnswerKind("none", "not text")
    for kind, words, test in (
        ("hash", "end with `#### ANSWER`", lambda text: "####" in text),
        ("boxed", r"state their answer in \boxed{}", lambda text: boxed_answer(text) is not None),
    ):
        found = _count(texts, test)
        if found >= HALF * len(texts):
            rest = len(texts) - found
            doubt = f"{rest} of {len(texts)} do not {words}; such rows are skipped" if rest else ""
            return AnswerKind(kind, f"{found} of {len(texts)} {words}", doubt)  # type: ignore[arg-type]
    return _short_kind(texts)


def _short_kind(texts: Sequence[str]) -> AnswerKind:
    """The kind of answers that stand alone."""
    n = len(texts)
    letters = _count(texts, lambda text: bool(_LETTER.fullmatch(text)))
    numbers = _count(texts, _is_number)
    formulas = _count(texts, _is_formula)
    short = _count(texts, _is_short)
    if letters >= MOST * n:
        return AnswerKind("letter", f"{letters} of {n} are single letters")
    if numbers >= MOST * n:
        return AnswerKind("math", f"{numbers} of {n} are numbers")
    if formulas >= MOST * n:
        return AnswerKind("math", f"{formulas} of {n} are numbers or formulas")
    if short >= MOST * n and formulas >= 0.3 * n:
        other = next(text for text in texts if not _is_formula(text))
        doubt = (f"{formulas} of {n} are numbers or formulas, others are text such as {other!r}, "
                 r"which the reward compares with the text in \boxed{}")  # fmt: skip
        return AnswerKind("math", f"{formulas} of {n} are numbers or formulas", doubt)
    if short >= MOST * n:
        return AnswerKind("text", f"{short} of {n} have at most {SHORT_WORDS} words")
    return AnswerKind("free", f"{n - short} of {n} are longer texts, which no rule can grade")


def _count(texts: Sequence[str], test: Callable[[str], bool]) -> int:
    return sum(map(test, texts))


def _is_number(text: str) -> bool:
    return len(text) <= FORMULA_CHARS and number(text) is not None


def _is_formula(text: str) -> bool:
    """True for a number or a formula: some symbol, and not more words than symbols."""
    if _is_number(text):
        return True
    words = len(re.findall(r"(?<!\\)\b[A-Za-z]{3,}\b", text))
    single = "\n" not in text and len(text) <= FORMULA_CHARS
    return single and bool(_FORMULA.search(text)) and words <= 1


def _is_short(text: str) -> bool:
    return len(text) <= SHORT_CHARS and "\n" not in text and len(text.split()) <= SHORT_WORDS
