# ruff: noqa: RUF001 - models write full-width characters
r"""Extraction of the final answer of a text, in linear time: \boxed{}, <answer> tags, phrases."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gft_lite.rewards.unicode_latex import to_latex

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"<(/?)answer\s*>", re.IGNORECASE)
_BRACELESS = re.compile(r"\\(?:boxed|fbox)(?:\s+|(?=\d))(-?[\w.]+)")

#: Between two boxes that form one answer: only punctuation, `x =` and these words.
_LINKS = frozenset(
    ["and", "or", "maybe", "perhaps", "possibly", "even", "also", "either", "both", "else",
     "alternatively", "respectively", "could", "be", "it", "text", "quad"]
)  # fmt: skip
_LINK_CHARS = 60
_MOST_PARTS = 20
_NESTED_CHARS = 2000

_PHRASE = re.compile(
    r"answers?\**\s*(?:\bis\b|\bare\b|[:=：])(?:\s*(?::|therefore|thus|simply|equal to))*"
    r"|(?:答案|结果)\s*(?:应?[是为]|等于|[:：])+",
    re.IGNORECASE,
)
_OPENERS = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_SENTENCE_END = re.compile(
    r"[.。!！?？;；](?=\s|$|\*)|[。；！？]|，(?!\s*[\d−－-])|\n|,?\s+(?:because|since|which|so)\b|\*\*"
)
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")


#: Start, end and content of a box or a tag.
Span = tuple[int, int, str]


def boxes(text: str) -> list[Span]:
    r"""Every outermost closed \boxed or \fbox as (start, end, content), in order."""
    found: list[Span] = []
    open_braces: list[tuple[int, int] | None] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0] != "}":
            if token[0].endswith("{") and len(token[0]) > 2:
                open_braces.append((token.start(), token.end()))
        elif open_braces and (opened := open_braces.pop()) is not None:
            while found and found[-1][0] > opened[0]:
                found.pop()
            found.append((opened[0], token.end(), text[opened[1] : token.start()]))
    if not found:
        found = [(m.start(), m.end(), m[1]) for m in _BRACELESS.finditer(text)]
    return found


def answer_tags(text: str) -> list[Span]:
    """Every closed, non-empty <answer>...</answer> as (start, end, content), in order."""
    found: list[Span] = []
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text) if "</" in text else ():
        if not tag[1]:
            opened = tag
        elif opened is not None:
            content = text[opened.end() : tag.start()].strip()
            found += [(opened.start(), tag.end(), content)] if content else []
            opened = None
    return found


def boxed_answer(text: str) -> str | None:
    """The content of the last box; adjacent boxes that differ are joined, so a hedge is wrong."""
    return _last_answer(text, _unwrapped_boxes(text))


def explicit_answer(text: str) -> str | None:
    """The content of the last box or <answer> tag; adjacent ones that differ are joined.

    In a tag, the answer may be in a box or after a phrase.
    """
    tags = [
        (start, end, boxed_answer(content) or _phrase_answer(content) or content)
        for start, end, content in answer_tags(text)
    ]
    outermost: list[Span] = []
    for span in sorted([*tags, *_unwrapped_boxes(text)]):
        if not outermost or span[0] >= outermost[-1][1]:
            outermost.append(span)
    return _last_answer(text, outermost)


def stated_answer(text: str) -> str | None:
    """The explicit answer, else that of the last `the answer is ...` or final `#### ...`."""
    explicit = explicit_answer(text)
    return _phrase_answer(text) if explicit is None else explicit


def last_number(text: str) -> str | None:
    """The last number of the text, for comparison with graders that use it."""
    last = None
    for last in _NUMBER.finditer(to_latex(text)):  # noqa: B007
        pass
    return last[0].rstrip(",") if last else None


def _unwrapped_boxes(text: str) -> list[Span]:
    return [(start, end, _unwrap(content)) for start, end, content in boxes(text)]


def _last_answer(text: str, spans: Sequence[Span]) -> str | None:
    """The content of the last span, joined with those that are adjacent to it and differ."""
    if not spans:
        return None
    start, _, content = spans[-1]
    parts = [content]
    for left_start, left_end, left_content in reversed(spans[:-1]):
        if len(parts) >= _MOST_PARTS or not _adjacent(text[left_end:start]):
            break
        if left_content not in parts:
            parts.insert(0, left_content)
        start = left_start
    return ", ".join(parts)


def _phrase_answer(text: str) -> str | None:
    last = None
    for last in _PHRASE.finditer(text):  # noqa: B007
        pass
    marker = text.rfind("####")
    if marker >= 0 and (last is None or marker > last.start()):
        line = text[marker + 4 :].strip()
        if line and "\n" not in line:
            return line
    return _clip(text[last.end() :]) if last else None


def _unwrap(content: str) -> str:
    content = content.strip()
    while len(content) < _NESTED_CHARS and content.startswith(("\\boxed", "\\fbox")):
        inner = boxes(content)
        if len(inner) != 1 or inner[0][1] != len(content):
            break
        content = inner[0][2].strip()
    return content


def _adjacent(between: str) -> bool:
    if len(between) > _LINK_CHARS or "\n\n" in between.strip("$ \n"):
        return False
    words = re.findall(r"[^\W\d_]{2,}", between)
    return all(word.lower() in _LINKS for word in words) and not re.search(r"\d", between)


def _clip(rest: str) -> str | None:
    """The answer at the start of the text after `answer is`: one formula, or the clause."""
    rest = rest[:2000].lstrip(" \t\r\n*_:：")
    for opener, closer in _OPENERS.items():
        if rest.startswith(opener):
            end = rest.find(closer, len(opener))
            if end < 0 and re.match(r"\$\d", rest):
                break  # a price, not a formula
            return rest[len(opener) : end].strip() or None if end >= 0 else None
    end_match = _SENTENCE_END.search(rest)
    answer = (rest[: end_match.start()] if end_match else rest).strip().rstrip(".,")
    return answer if answer and "\\boxed" not in answer and "\\fbox" not in answer else None
