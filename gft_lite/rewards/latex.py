"""Normalization of answer strings in linear time, before they are compared."""

from __future__ import annotations

import re

from gft_lite.rewards.unicode_latex import to_latex

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_DELIMITERS = re.compile(r"(?<!\\)\$|\\[()]|(?<!\\)\\\[|(?<!\\)\\\](?![\d.]*(?:pt|em|ex|mm)\])")
_STYLES = re.compile(
    r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?)(?![A-Za-z])|\*\*"
)
_ENDS = re.compile(r"\A[\s,;]+|(?:\\?[,;]|\\?\s)+\Z")
#: Not `~` between digits, where it means a range.
_SPACES = re.compile(r"\\[,;:!> ]|\\q?quad(?![A-Za-z])|(?<!\d)~|~(?!\d)|\s")
_TEXT = re.compile(
    r"\\(?:text|mathrm|textbf|textit|textrm|textnormal|mathbf|mathit|mathsf|mbox|hbox|operatorname)"
    r"\*?\s*\{([^{}]*)\}"
)
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\\\d.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![A-Za-z\d])")


def tidy(answer: str) -> str:
    r"""Remove delimiters and control characters; write Unicode, `1e5`, \leqslant as plain LaTeX."""
    answer = _CONTROL.sub("", to_latex(answer))
    answer = _DELIMITERS.sub(" ", answer)
    answer = answer.replace(r"\leqslant", r"\le").replace(r"\geqslant", r"\ge")
    answer = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", answer)
    return _ENDS.sub("", answer).removesuffix(".").strip()


def squash(answer: str) -> str:
    r"""Remove spaces, \left and \right from a tidy answer, and unify {,} and fractions."""
    answer = _SPACES.sub("", _STYLES.sub("", answer))
    answer = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", answer).replace("{,}", ",")
    return answer.replace(r"\bmatrix", r"\pmatrix")


def unwrap_text(answer: str) -> str:
    r"""Replace every \text{...} and similar command by its content."""
    while (opened := _TEXT.sub(r"\1", answer)) != answer:
        answer = opened
    return answer


def text_key(answer: str) -> str:
    """The comparison key of a verbal answer: no case, wrappers or extra space."""
    key = _SPACES.sub(" ", unwrap_text(tidy(answer))).casefold()
    key = re.sub(r"[\\{}\"'.]", "", key)
    key = re.sub(r"\s*([-,/:;])\s*", r"\1", " ".join(key.split()))
    return key.removeprefix("(").removesuffix(")") if key.count("(") <= 1 else key


def same_text(a: str, b: str) -> bool:
    """True if two verbal answers have the same key; without any letter or digit, if they match."""
    key = text_key(a)
    return key == text_key(b) and (a == b or any(char.isalnum() for char in key))
