"""Renderings by a tokenizer's chat template, and what they show of it: sentinels and checks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from gft_lite.utils.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str | None]  # A user's text, and the assistant's answer once there is one.

# Plain letters, which no chat template trims, escapes or parses, in both cases.
SYSTEM, QUESTION, ANSWER = "QzSystemZq", "QzQuestionZq", "QzAnswerZq"
THINK, END_THINK = "<think>", "</think>"
# The mark of a template that prints a list of content parts instead of their texts.
_PRINTED_PARTS = re.compile(r"""['"]text['"]\s*:""")
SHOWN = 60  # characters of a rendering in an error
_PLAIN = "Or use style: plain, with the turns written in template"
ADVICE = {
    "system": "Leave system out, or write it in template.",
    "style": f"Correct chat_template.jinja in the model's folder. {_PLAIN}.",
    "end": f"Use a tokenizer that has it. {_PLAIN}.",
}


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders conversations by a tokenizer's chat template, with an optional system message.

    The content of the roles `in_parts` is given as a list of parts, not as text. `variables` are
    the recipe's `chat_template_kwargs`. `thoughts_apart`: the thoughts of an answer are its
    message's `reasoning_content`.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str | None
    in_parts: frozenset[str] = frozenset()
    variables: Mapping[str, Any] = field(default_factory=dict)
    thoughts_apart: bool = False

    def render(self, turns: Iterable[Turn], *, generation_prompt: bool) -> str:
        """The conversation as text, closed or with the prompt for an answer at its end."""
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append(self._message("system", self.system))
        for question, answer in turns:
            messages.append(self._message("user", question))
            if answer is not None:
                messages.append(self._message("assistant", answer))
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **self.variables
        )
        return str(rendered)

    def _message(self, role: str, text: str) -> dict[str, Any]:
        apart: dict[str, str] = {}
        if self.thoughts_apart and role == "assistant" and END_THINK in text:
            thoughts, _, text = text.rpartition(END_THINK)
            apart = {"reasoning_content": thoughts.strip().removeprefix(THINK).strip()}
            text = text.lstrip()
        parts = [{"type": "text", "text": text}]
        return {"role": role, "content": parts if role in self.in_parts else text, **apart}


@dataclass(frozen=True, slots=True)
class Sample:
    """Renderings of sentinels, which show what a template writes around the messages.

    `prompt` ends with the generation prompt, `closed` is the same without it; `conversation` has
    the answer. `end` is what follows the answer up to and including the token `end_id`; None for
    a template that writes no end of turn.
    """

    prompt: str
    closed: str
    conversation: str
    end: str = ""
    end_id: int | None = None

    @property
    def before_answer(self) -> str:
        """The conversation up to the answer."""
        return self.conversation.partition(ANSWER)[0]

    @property
    def after_answer(self) -> str:
        """What follows the answer in the conversation."""
        return self.conversation.partition(ANSWER)[2]

    @property
    def opening(self) -> str:
        """What the prompt writes before an answer and the conversation does not."""
        fits = self.prompt.startswith(self.before_answer)
        return self.prompt[len(self.before_answer) :] if fits else ""


def fit_renderer(renderer: Renderer, field: str) -> Renderer:
    """The renderer with the roles whose content the template reads as parts: none, all, or some.

    Raises: RecipeError for a template that is right with none of them.
    """
    has_system = renderer.system is not None
    roles = ("assistant", "system", "user") if has_system else ("assistant", "user")
    some = (c for n in range(1, len(roles)) for c in combinations(roles, n))
    first: RecipeError | None = None
    for in_parts in map(frozenset, ((), roles, *some)):
        sentinel = replace(renderer, system=SYSTEM if has_system else None, in_parts=in_parts)
        try:
            _check(sentinel, field)
        except RecipeError as error:
            first = first or error
        else:
            return replace(renderer, in_parts=in_parts)
    raise first or RecipeError([])


def fit_thoughts(renderer: Renderer) -> Renderer:
    """The renderer that gives thoughts as the template reads them: in the text, or apart."""
    answer = f"{THINK}\n{SYSTEM}\n{END_THINK}\n\n{ANSWER}"
    for apart in (False, True):
        found = replace(renderer, thoughts_apart=apart)
        try:
            whole = found.render([(QUESTION, answer)], generation_prompt=False)
        except Exception:  # a template is a program
            continue
        turn = whole.partition(QUESTION)[2]
        if has_in_order(turn, [THINK, SYSTEM, END_THINK, ANSWER]) and turn.count(THINK) == 1:
            return found
    return renderer


def _check(renderer: Renderer, field: str) -> None:
    """Render sentinels. Raises: RecipeError with the difference if the rendering is not right."""
    has_system = renderer.system is not None
    try:
        sample = take_sample(renderer)
    except Exception as error:  # a template is a program
        what, advice = ("system", "Leave system out.") if has_system else ("style", f"{_PLAIN}.")
        reason = " ".join(str(error).split())[: 3 * SHOWN]
        rule = f"must suit the model's chat template, which says: {reason}"
        raise RecipeError([f"{field}.{what}: {rule}. {advice}"]) from None
    whole = sample.conversation
    given = {"system": SYSTEM, "style": QUESTION} if has_system else {"style": QUESTION}
    for what, text in given.items():
        if text not in sample.prompt or text not in whole:
            lost = "the system message" if what == "system" else "the problem"
            rule = f"must suit the model's chat template, which leaves {lost} out of the prompt"
            raise RecipeError([f"{field}.{what}: {rule} {end_of(sample.prompt)}. {ADVICE[what]}"])
    expected = [*given.values(), ANSWER]
    if re.findall("|".join(expected), whole) != expected or _PRINTED_PARTS.search(whole):
        rule = "must suit the model's chat template, which writes the conversation as"
        raise RecipeError([f"{field}.style: {rule} {end_of(whole)}. {ADVICE['style']}"])
    if not _prompt_fits(sample):
        in_prompt, in_conversation = _difference(sample.prompt, sample.before_answer)
        rule = (f"must suit the model's chat template, which writes {in_conversation!r} before "
                f"an answer, but {in_prompt!r} as its generation prompt")  # fmt: skip
        raise RecipeError([f"{field}.style: {rule}. {ADVICE['style']}"])
    if sample.end_id is None and sample.after_answer.strip():
        rule = f"must have an end of turn that is a token, got {sample.after_answer!r} as text"
        raise RecipeError([f"{field}.style: {rule}. {ADVICE['end']}"])


def _prompt_fits(sample: Sample) -> bool:
    """True if the prompt is the beginning of a conversation, or what answers begin with.

    The prompt may be longer than the text before an answer: it opens a block of thoughts. It may
    be shorter: responses then begin with the rest (an empty block of thoughts), but that can't be
    the role of a template without a generation prompt. Where both have a block of thoughts, that
    of an answer without thoughts may be written otherwise.
    """
    prompt, before = sample.prompt, sample.before_answer
    if prompt.startswith(before):
        return True
    if THINK in prompt.rpartition(QUESTION)[2]:
        prompt, before = (text.rpartition(THINK)[0] for text in (prompt, before))
        return bool(prompt) and prompt == before
    no_generation_prompt = prompt == sample.closed
    rest = before[len(prompt) :]
    return before.startswith(prompt) and not (no_generation_prompt and rest.strip())


def take_sample(renderer: Renderer) -> Sample:
    sample = Sample(
        prompt=renderer.render([(QUESTION, None)], generation_prompt=True),
        closed=renderer.render([(QUESTION, None)], generation_prompt=False),
        conversation=renderer.render([(QUESTION, ANSWER)], generation_prompt=False),
    )
    tokens = {i: t.content for i, t in renderer.tokenizer.added_tokens_decoder.items()}
    if renderer.tokenizer.eos_token is not None:
        tokens[renderer.tokenizer.eos_token_id] = renderer.tokenizer.eos_token
    end, end_id = _up_to_token(sample.after_answer, tokens)
    if end_id is None and not sample.after_answer.strip():
        end, end_id = _end_before_next_turn(renderer, tokens)
    return replace(sample, end=end, end_id=end_id)


def _up_to_token(text: str, tokens: Mapping[int, str]) -> tuple[str, int | None]:
    """The text up to and including its first special token, and the token; ("", None) if none."""
    # The longest of those that begin at the same place.
    places = [(text.find(t), -len(t), i) for i, t in tokens.items() if t.strip() and t in text]
    if not places:
        return "", None
    place, negative_length, token_id = min(places)
    return text[: place - negative_length], token_id


def _end_before_next_turn(renderer: Renderer, tokens: Mapping[int, str]) -> tuple[str, int | None]:
    """The end of turn of a template that leaves the last turn open: one that every turn has."""
    turns = [(QUESTION, ANSWER), (SYSTEM, None)]
    try:
        whole = replace(renderer, system=None).render(turns, generation_prompt=False)
    except Exception:  # a template may reject this order of turns
        return "", None
    start, _, rest = whole.partition(QUESTION)
    after_question, _, rest = rest.partition(ANSWER)
    end, end_id = _up_to_token(rest.partition(SYSTEM)[0], tokens)
    of_question = _up_to_token(after_question, tokens)[1]
    start_of_turn = _up_to_token(start.removeprefix(str(renderer.tokenizer.bos_token)), tokens)[1]
    return (end, end_id) if end_id == of_question != start_of_turn else ("", None)


def _difference(first: str, second: str) -> tuple[str, str]:
    """Both texts from shortly before their first difference."""
    equal = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    start = max(next(equal, min(len(first), len(second))) - SHOWN // 2, 0)
    return first[start : start + SHOWN], second[start : start + SHOWN]


def end_of(text: str) -> str:
    return repr(text if len(text) <= 3 * SHOWN else f"...{text[-3 * SHOWN :]}")


def packed(text: str) -> str:
    """The text without spaces, which many templates trim."""
    return "".join(text.split())


def contains(rendering: str, text: str) -> bool:
    """Whether a rendering has the text but for spaces."""
    return packed(text) in packed(rendering)


def has_in_order(rendering: str, texts: Iterable[str]) -> bool:
    """Whether a rendering has the texts one after another, but for spaces."""
    rest = packed(rendering)
    for text in map(packed, texts):
        _, found, rest = rest.partition(text) if text else ("", "-", rest)
        if not found:
            return False
    return True
