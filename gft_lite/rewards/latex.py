# ruff: noqa: RUF001 - models write full-width characters
"""Normalization of answer strings in linear time, before they are compared."""

from __future__ import annotations

import re

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "∞": r"\infty ",
        "π": r"\pi ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "°": r"^{\circ}", "²": "^{2}", "³": "^{3}", "±": r"\pm ", "∅": r"\emptyset ",
        "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "％": "%", "＄": r"\$",
        "，": ",", "：": ":", "；": ";", "（": "(", "）": ")", "　": " ", "\u00a0": " ",
        "\u2009": " ", "\u202f": " ", "“": '"', "”": '"', "’": "'",
    }
)  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_DELIMITERS = re.compile(r"(?<!\\)\$|\\[()]|(?<!\\)\\\[|(?<!\\)\\\](?![\d.]*(?:pt|em|ex|mm)\])")
_STYLES = re.compile(
    r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?)(?![A-Za-z])|\*\*"
)
_SPACES = re.compile(r"\\[,;:!> ]|\\q?quad(?![A-Za-z])|~|\s")
_TEXT = re.compile(
    r"\\(?:text|mathrm|textbf|textit|textrm|textnormal|mathbf|mathit|mathsf|mbox|hbox|operatorname)"
    r"\*?\s*\{([^{}]*)\}"
)
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\\\d.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![A-Za-z\d])")


def tidy(answer: str) -> str:
    r"""Remove delimiters and control characters; rewrite `1e5` and \leqslant in plain LaTeX."""
    answer = _CONTROL.sub("", answer).translate(_CHARACTERS)
    answer = _DELIMITERS.sub(" ", answer)
    answer = answer.replace(r"\leqslant", r"\le").replace(r"\geqslant", r"\ge")
    answer = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", answer)
    answer = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", answer)
    return answer.strip(" \n\t,;").removesuffix(".").strip()


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
    key = re.sub(r"\s*([-–—,/:;])\s*", r"\1", " ".join(key.split()))
    return key.removeprefix("(").removesuffix(")") if key.count("(") <= 1 else key
