"""Exact comparison of plain numbers: integers, decimals, fractions, percent, powers of ten."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from gft_lite.rewards.latex import squash

#: For decimals and powers of ten, which are rounded values; integers and fractions are exact.
RELATIVE_TOLERANCE = Fraction(1, 10**6)


class Number(NamedTuple):
    """A value; `percent`: written with a percent sign; `rounded`: a decimal or power of ten."""

    value: Fraction
    percent: bool = False
    rounded: bool = False


_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_SIGNED = rf"[+-]?{_UNSIGNED}"
_DECIMAL = re.compile(_UNSIGNED)
_RATIO = re.compile(
    rf"(?P<whole>\d+)?\\frac(?:\{{(?P<a>{_SIGNED})\}}|(?P<a1>\d))(?:\{{(?P<b>{_SIGNED})\}}|(?P<b1>\d))"
)
_SLASH = re.compile(rf"\(?({_UNSIGNED})\)?/\(?({_UNSIGNED})\)?")
_MIXED_SLASH = re.compile(r"(\d+)\s+(\d+)/(\d+)")
_POWER_OF_TEN = re.compile(
    rf"(?:(?P<mantissa>{_UNSIGNED})(?:\\times|\\cdot|\*|x))?10\^(?:\{{(?P<e>[+-]?\d{{1,4}})\}}|(?P<e1>\d))"
)

_PERCENT = re.compile(r"(?:\\?%|\\text\{\\?%\}|(?:\\(?:text|mathrm)\{)?(?:percent|pct)\}?)$")
_CURRENCY = re.compile(
    r"^([+-]?)(?:\\text\{)?(?:\\?\$|\\pounds|\\euro|US\\?\$|Rs\.?)\}?(?=[\d.(\\+-])"
)
_WRAPPED_UNIT = re.compile(
    r"\\(?:text|mathrm|textbf|textit|textrm|mbox|operatorname|rm)\s*\{([^{}\d%]*)\}"
    r"(?:\^(?:\{-?\d\}|\d|\{\\circ\}))?$"
)
_DEGREES = re.compile(r"\^(?:\{\\circ\}|\\circ)(?:\\(?:text|mathrm)\{[CF]\}|[CF])?$|\\degree$")
_UNIT_WORD = (
    r"(?:[cmk]?m|km/h|m/s|mph|kmh|[km]?g|lbs?|oz|ft|in|yd|hrs?|h|mins?|s|secs?|m?l|L|N|J|W|V|Hz|K)"
)
_ATTACHED_UNIT = re.compile(rf"(?<=[\d}})]){_UNIT_WORD}(?:\^(?:\{{[23]\}}|[23]))?$")
_SPACED_UNIT = re.compile(
    rf"(?<=[\d}})])(?:\s|\\ |\\,|~)+(?:{_UNIT_WORD}|(?!and\b|or\b)[A-Za-z]{{3,}})"
    r"(?:\s+(?!and\b|or\b)[A-Za-z]{2,}){0,5}(?:\^(?:\{[23]\}|[23]))?$"
)
_NOT_UNITS = re.compile(r"\b(?:and|or|sqrt|[ap]\.?\s?m\b)", re.IGNORECASE)
_NAME = re.compile(r"^\s*\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?\s*=(?!=)")


def number(answer: str) -> Number | None:
    r"""Parse a tidy answer as a plain number, without units, currency and `x =`; else None."""
    if len(answer) > 200 or not any(c.isdigit() for c in answer):
        return None
    answer = strip_units(_NAME.sub("", answer, count=1).strip())
    mixed = _MIXED_SLASH.fullmatch(answer.lstrip("+-"))
    if mixed:
        answer = re.sub(r"\s+(\d+)/(\d+)", r"\\frac{\1}{\2}", answer)
    answer = squash(answer)
    percent = _PERCENT.search(answer)
    if percent:
        answer = answer[: percent.start()]
    answer = _CURRENCY.sub(r"\1", answer)
    value = _value(answer)
    if value is None:
        return None
    if percent:
        value = value._replace(value=value.value / 100, percent=True)
    return value


def same_number(a: Number, b: Number) -> bool:
    """Whether two numbers are equal: to 1e-6 if one is rounded; one missing % sign is ignored."""
    if _close(a, b):
        return True
    if a.percent == b.percent:
        return False
    return _close(a._replace(value=a.value * 100), b) if a.percent else same_number(b, a)


def strip_units(answer: str) -> str:
    """Remove trailing units from an answer as long as a number remains."""
    for _ in range(3):
        wrapped = _WRAPPED_UNIT.search(answer)
        match = _DEGREES.search(answer) or _ATTACHED_UNIT.search(answer)
        match = match or _SPACED_UNIT.search(answer) or wrapped
        if match is None or match.start() == 0 or _NOT_UNITS.search(match[0]):
            break
        if match is wrapped and re.fullmatch(r"\s*(?:percent|pct)\s*", match[1]):
            break
        if re.fullmatch(r"\s*(?:\\ )?(?:percent|pct)\s*", match[0]):
            break
        answer = answer[: match.start()].rstrip("\\ ,;~\n\t")
    return answer


def _value(text: str) -> Number | None:
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-") if text[:2] not in ("--", "++", "+-", "-+") else text
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and _DECIMAL.search(text):
        inner = text[1:-1]
        if inner[:1] == "-" or any(c in inner for c in "(){}"):
            break
        text = inner
    text = unwrapped_number(text)
    if _DECIMAL.fullmatch(text):
        return Number(sign * _fraction(text), rounded="." in text)
    if match := _POWER_OF_TEN.fullmatch(text):
        mantissa = _fraction(match["mantissa"] or "1")
        power = Fraction(10) ** int(match["e"] or match["e1"])
        return Number(sign * mantissa * power, rounded=True)
    if match := _RATIO.fullmatch(text):
        top, bottom = match["a"] or match["a1"], match["b"] or match["b1"]
        whole = match["whole"]
        if _fraction(bottom) == 0 or (whole and not (top + bottom).isdigit()):
            return None
        value = int(whole or 0) + _fraction(top) / _fraction(bottom)
        return Number(sign * value, rounded="." in top + bottom)
    if (match := _SLASH.fullmatch(text)) and _fraction(match[2]) != 0:
        rounded = "." in match[1] + match[2]
        return Number(sign * _fraction(match[1]) / _fraction(match[2]), rounded=rounded)
    return None


def unwrapped_number(text: str) -> str:
    r"""The content of a \text{5} or \mathbf{5} that holds the whole number."""
    match = re.fullmatch(r"\\(?:text|mathrm|textbf|mathbf|bf|bm|boldsymbol)\{([^{}]*)\}", text)
    return match[1] if match else text


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").removeprefix("+"))


def _close(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    whole = a.value.denominator == b.value.denominator == 1
    if whole or not (a.rounded or b.rounded):
        return False
    return abs(a.value - b.value) <= RELATIVE_TOLERANCE * max(abs(a.value), abs(b.value))
