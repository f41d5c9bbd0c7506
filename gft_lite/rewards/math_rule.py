"""The mathematics reward: exact numbers first, math-verify on the answer only, never `eval`.

math-verify (its LaTeX grammar, not its expression parser) gets a normalized answer of limited
size, so that model text never reaches the parsers of Python or sympy, which evaluate code. A
grading that hangs all the same is killed by `worker_pool.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from gft_lite.rewards import choice_rule as choice
from gft_lite.rewards.base import Grade, Rule
from gft_lite.rewards.extract import last_number as find_last_number
from gft_lite.rewards.extract import stated_answer
from gft_lite.rewards.latex import same_text, squash, tidy, unwrap_text
from gft_lite.rewards.numeric import number, same_number

#: Longer or more explosive answers would take sympy minutes or gigabytes.
MAX_CHARS = 1200
_MOST = {"(": 60, "\\frac": 40, "!": 12}
_COSTLY = (
    re.compile(r"\d{60}|(?:\{\s?){12}"),
    re.compile(r"\^\s?\{[^{}^]{0,20}\^\s?\{[^{}^]{0,20}\^"),  # towers of three
    re.compile(r"\d\s?\^\s?[({]\s?\d+\s?\^|\^\s?\w{1,6}\s?\^"),  # numeric towers of two
    re.compile(r"\^\s?[({]?[-+ ]{0,2}\d{5}"),
    re.compile(r"\d{5}[)} ]{0,3}!|![)} ]{0,4}!|\^\s?\{?[^()!{}]{0,20}[)} ]{1,4}!"),
    re.compile(r"binom\s?\{?\s?\d{5}"),
)
_CLOCK = re.compile(r"(\d{1,2})(?::(\d\d))?\s*(?:([ap])\.?\s*m\.?|o'clock)?", re.IGNORECASE)
_RATIO = re.compile(r"(\d+)\s*:\s*(\d+)")
_BASE = re.compile(r"_\{?\(?(?:\\text\{)?(\w+)\}?\)?\}?$")
#: Shorter words may be products of variables.
_LONG_WORD = re.compile(r"[A-Za-z]{4}|\b(?:yes|no)\b", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z][A-Za-z \-'.,/]*")


def make(last_number: bool = False) -> Rule:
    """Build the rule: the stated final answer must equal the gold answer.

    Args:
        last_number: Grade a text without a stated answer by its last number. Set it for
            evaluations only.
    """

    def grade(text: str, answer: str | None, answer_type: str | None = None) -> Grade:
        if answer is None:
            return Grade(0.0, "error")
        if answer_type == "choice":
            return choice.grade(text, answer)
        stated = stated_answer(text)
        if stated is None and last_number:
            stated = find_last_number(text)
        return compare(stated, answer) if stated else Grade(0.0, "no_answer")

    return grade


def compare(stated: str, gold: str) -> Grade:
    """Grade a stated answer against the gold one: as text, as numbers, then by math-verify."""
    if stated.strip() == gold.strip():
        return Grade(1.0)
    if len(stated) > MAX_CHARS or too_costly(stated := tidy(stated)):
        return Grade(0.0, "unparsed")
    gold = tidy(gold)
    if squash(stated) == squash(gold):
        return Grade(1.0)
    for decide in (_as_numbers, _as_time_or_ratio, _as_text):
        same = decide(stated, gold)
        if same is not None:
            return Grade(float(same))
    return _by_math_verify(stated, gold)


def too_costly(answer: str) -> bool:
    """Whether an answer is too long or too expensive to evaluate for sympy."""
    if len(answer) > MAX_CHARS or any(answer.count(part) > most for part, most in _MOST.items()):
        return True
    return any(pattern.search(answer) for pattern in _COSTLY)


def _as_numbers(stated: str, gold: str) -> bool | None:
    gold_number = number(gold)
    if gold_number is None or ("=" in stated and "=" in gold):
        return None
    stated_number = number(stated)
    return None if stated_number is None else same_number(stated_number, gold_number)


def _as_time_or_ratio(stated: str, gold: str) -> bool | None:
    stated, gold = (" ".join(unwrap_text(squash(s)).split()) for s in (stated, gold))
    times = [_CLOCK.fullmatch(s) for s in (stated, gold)]
    if times[1] and (times[1][3] or (":" in gold and int(times[1][1]) < 24)):
        return times[0] is not None and _minutes(times[0], times[1]) == _minutes(times[1])
    ratios = [_RATIO.fullmatch(s) for s in (stated, gold)]
    if ratios[0] and ratios[1]:
        (a, b), (c, d) = (map(int, r.groups()) for r in ratios if r)
        return a * d == b * c
    bases = [_BASE.search(s) for s in (stated, gold)]
    if bases[0] and bases[1] and all(re.match(r"[\dA-F]+_", s) for s in (stated, gold)):
        return stated[: bases[0].start()] == gold[: bases[1].start()] and bases[0][1] == bases[1][1]
    return None


def _minutes(time: re.Match[str], gold: re.Match[str] | None = None) -> tuple[int, str]:
    """Minutes since 0:00 and "a", "p" or "", which is ignored if the gold answer has none."""
    half = (time[3] or "").lower()
    if gold is not None and not gold[3]:
        half = ""
    return int(time[1]) * 60 + int(time[2] or 0), half


def _as_text(stated: str, gold: str) -> bool | None:
    plain = unwrap_text(gold)
    if _WORDS.fullmatch(plain) and (plain != gold or _LONG_WORD.search(plain)):
        return same_text(stated, gold)
    return True if squash(unwrap_text(stated)) == squash(plain) else None


def _by_math_verify(stated: str, gold: str) -> Grade:
    parse, verify = _engine()
    # Without the spaces, math-verify would take the last term of `a + b + c` for a unit.
    right, left = (parse(re.sub(r"\s*([-+=])\s*", r"\1", answer)) for answer in (gold, stated))
    if not right or not left:
        return Grade(0.0, "unparsed")
    if not verify(right, left):
        return Grade(0.0)
    return Grade(float(not _tiny_and_different(left[0], right[0])))


def _tiny_and_different(a: Any, b: Any) -> bool:
    """Whether two floats are equal only because math-verify rounds to six decimals."""
    from sympy import Expr, Float

    if not (isinstance(a, Expr) and isinstance(b, Expr) and a.is_number and b.is_number):
        return False
    if not (a.has(Float) or b.has(Float)):
        return False
    left, right = complex(a.evalf()), complex(b.evalf())
    largest = max(abs(left), abs(right))
    return largest < 1e-2 and abs(left - right) > 1e-6 * largest


@cache
def _engine() -> tuple[Callable[[str], list[Any]], Callable[[Any, Any], bool]]:
    """Import math-verify; its parser and comparison, without its own timeouts."""
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ImportError("math-verify: must be installed. Run: pip install math-verify") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    @lru_cache(maxsize=2048)
    def parsed(answer: str) -> list[Any]:
        return parse(
            f"\\boxed{{{answer}}}",
            config,
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
        )

    def same(gold: Any, stated: Any) -> bool:
        return verify(gold, stated, allow_set_relation_comp=True, timeout_seconds=None)

    return parsed, same
