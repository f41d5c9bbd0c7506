# ruff: noqa: RUF001 - models write full-width characters
r"""Find the final answer that a text states, in linear time: \boxed{}, or an explicit phrase."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
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
    r"[.。!！?？;；](?=\s|$|\*)|[。；！？，]|\n|,?\s+(?:because|since|which|so)\b|\*\*"
)
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Every outermost closed \boxed or \fbox as (start, end, content), in order."""
    found: list[tuple[int, int, str]] = []
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


def boxed_answer(text: str) -> str | None:
    """The content of the last box; adjacent boxes that differ are joined, so a hedge is wrong."""
    found = boxes(text)
    if not found:
        return None
    start, _, content = found[-1]
    parts = [_unwrap(content)]
    for left_start, left_end, left_content in reversed(found[:-1]):
        if len(parts) >= _MOST_PARTS or not _side_by_side(text[left_end:start]):
            break
        if (part := _unwrap(left_content)) not in parts:
            parts.insert(0, part)
        start = left_start
    return ", ".join(parts)


def stated_answer(text: str) -> str | None:
    """The answer of the last box, else of the last `the answer is ...` or final `#### ...`."""
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    last = None
    for last in _PHRASE.finditer(text):  # noqa: B007
        pass
    marker = text.rfind("####")
    if marker >= 0 and (last is None or marker > last.start()):
        line = text[marker + 4 :].strip()
        if line and "\n" not in line:
            return line
    return _clip(text[last.end() :]) if last else None


def last_number(text: str) -> str | None:
    """The last number of the text, for comparison with graders that use it."""
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007
        pass
    return last[0].rstrip(",") if last else None


def _unwrap(content: str) -> str:
    content = content.strip()
    while len(content) < _NESTED_CHARS and content.startswith(("\\boxed", "\\fbox")):
        inner = boxes(content)
        if len(inner) != 1 or inner[0][1] != len(content):
            break
        content = inner[0][2].strip()
    return content


def _side_by_side(between: str) -> bool:
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
