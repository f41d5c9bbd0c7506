"""The multiple-choice reward: one chosen letter, or a gold answer that is a word or phrase."""

from __future__ import annotations

import re
from string import ascii_uppercase

from gft_lite.rewards.base import Grade, Rule
from gft_lite.rewards.extract import explicit_answer, stated_answer
from gft_lite.rewards.latex import same_text, unwrap_text
from gft_lite.rewards.unicode_latex import to_plain_text

#: The letters of the options, in their order in a prompt.
LETTERS = ascii_uppercase
MAX_CHARS = 1200
#: At most six: an unbounded run before the letter makes a search over `((((...` quadratic.
_MARK = r"[*_\s$({\[【`]{0,6}"
#: Not the pronoun of `I think` and `I'd`.
_OPTION = r"(?:[A-HJ-Z]|I(?!['\u2019]|\s+(?!is\b|as\b|because\b|since\b|and\b|or\b)[a-z]))"
_LETTER = rf"(?:\\text(?:bf|rm|it)?\s*\{{)?{_MARK}({_OPTION})(?![A-Za-z])"
#: The letter at the start of a box: `B`, `(B)`, `B. 12`, `(B) 12`; not the variable of `x = 5`.
_BOXED = re.compile(
    rf"{_MARK}({_OPTION}|[a-z])(?=$|[\s).:,}}\]*$~\\、&/])"
    r"(?!\s*(?:[=<>+^]|\\(?:[gn]eq?|leq?|in|approx|times|cdot)(?![a-z])))"
)
_PHRASES = (
    re.compile(
        r"(?i:answers?|choices?|options?)\**\s*(?:(?i:is|are|to choose is|would be)\b|[:=])"
        rf"(?:\s*(?::|(?i:therefore|thus|simply|clearly|option|choice|either|letter)\b))*\s*{_LETTER}"
    ),
    re.compile(rf"(?i:\bI\s+(?:would\s+)?(?:choose|pick|select))\s+(?:(?i:option)\s+)?{_LETTER}"),
    re.compile(rf"(?:答案|选项|选择|故选|应选|选)\s*(?:应?[是为选]|:)*\s*{_LETTER}"),
    re.compile(
        rf"\b(?i:options?|choices?|answers?)\s+{_LETTER}[)}}*$.\s]{{0,6}}"
        r"(?:is|are)\s+(?:the\s+)?(?:correct|right|true|best)"
    ),
    re.compile(
        rf"(?<![A-Za-z])({_OPTION})[)}}*$.]{{0,6}}\s+is\s+(?:the\s+)?(?:correct|right|best)\b"
    ),
)
#: A response that begins with its letter: `B. 12`, `(B) 12`, `B`.
_LEADING = re.compile(
    rf"\s*(?:[*_$]*[(\[【]({_OPTION})[)\]】]|[*_$]*({_OPTION})[*_$]*(?:[.):]|\s*$))"
)
_ALONE = re.compile(rf"[\s*_$(\[【`]*({_OPTION})[\s*_$)\]】`.]*")
#: A second letter, joined to the first by a comma or a word: then none is chosen.
_HEDGE = re.compile(
    rf"[)}}\]】`*$]*(?:\s*(?:,|/|、|&|\bor\b|\band\b|或|和))+\s*"
    rf"(?:(?i:maybe|perhaps|possibly|option|choice)\s+)*{_LETTER}(?=$|[\s).,:;!?}}\]】`*$。、])"
)


def make() -> Rule:
    """Build the rule: letters or, if the gold answer is not a letter, normalized text."""
    return grade


def grade(text: str, answer: str | None, answer_type: str | None = None) -> Grade:
    """1 if the text chooses the gold letter (or text), 0 for another one, several or none."""
    if answer is None:
        return Grade(0.0, "error")
    gold = unwrap_text(to_plain_text(answer)).strip(" ().$")
    if len(gold) != 1 or gold not in LETTERS:
        stated = stated_answer(text)
        if stated is None:
            return Grade(0.0, "no_answer")
        return Grade(float(same_text(stated[:MAX_CHARS], answer)))
    chosen = chosen_letter(text)
    return Grade(float(chosen == gold)) if chosen else Grade(0.0, "no_answer")


def chosen_letter(text: str) -> str | None:
    """The one letter chosen by the last box or tag, else the last phrase, else the first word."""
    text = to_plain_text(text)
    explicit = explicit_answer(text)
    if explicit is not None:
        content = unwrap_text(explicit[:MAX_CHARS])
        match = _BOXED.match(content)
        if match:
            hedged = _HEDGE.match(content, match.end(1))
            return None if hedged else match[1].upper()
    last: re.Match[str] | None = None
    for pattern in _PHRASES:
        for match in pattern.finditer(text):
            if last is None or match.start(1) >= last.start(1):
                last = match
    if last is None:
        alone = _LEADING.match(text) or _ALONE.fullmatch(text.rstrip().rpartition("\n")[2])
        return next(filter(None, alone.groups())) if alone else None
    return None if _HEDGE.match(text, last.end(1)) else last[1]
