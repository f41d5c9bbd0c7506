"""Prompts and responses as a model's own chat template writes them, checked when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from gft_lite.data.base import Unusable
from gft_lite.data.chat_rendering import (
    ADVICE,
    ANSWER,
    END_THINK,
    QUESTION,
    SHOWN,
    SYSTEM,
    THINK,
    Renderer,
    contains,
    end_of,
    fit_renderer,
    fit_thoughts,
    has_in_order,
    packed,
    take_sample,
)
from gft_lite.recipe.sections import PromptSettings
from gft_lite.utils.errors import RecipeError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The variable that turns thoughts off in the templates of Qwen, SmolLM and GLM; of DeepSeek.
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A question after the (question, answer) turns of `history`.

    Its own `system` message takes the place of the recipe's.
    """

    question: str
    history: Sequence[tuple[str, str]] = ()
    system: str | None = None


_SENTINEL = Conversation(QUESTION)


class ChatTemplate:
    """A tokenizer's chat template.

    A prompt is the template's rendering with its generation prompt. A response is what the
    template's rendering of the whole conversation has after the prompt, up to its end of turn. A
    template that leaves out thoughts (`<think>` to `</think>`), as it does in earlier turns, has
    the response with them: the policy samples it so. `field` is the prompt's place in the recipe,
    for error texts.
    Raises: RecipeError for a template that loses or reorders messages, whose prompt differs from
    its conversation, or whose end of turn is no token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: PromptSettings, field: str = "prompt"
    ) -> None:
        if not tokenizer.chat_template:
            rule = "must be plain for a model without a chat template, got 'chat'"
            raise RecipeError([f"{field}.style: {rule}. Or train a chat-tuned model."])
        self._field, system = field, prompt.system
        renderer = Renderer(tokenizer, system, variables=prompt.chat_template_kwargs)
        try:
            self._renderer = fit_thoughts(fit_renderer(renderer, field))
        except RecipeError as error:
            raise _of_variables(error, renderer, field) or error from None
        self._sample = take_sample(self._renderer)
        self.end_id = self._sample.end_id
        if system is not None and not contains(self._sample.prompt, system):
            rule = "must suit the model's chat template, which changes the system message to"
            changed = self._sample.prompt.partition(QUESTION)[0]
            raise RecipeError([f"{field}.system: {rule} {end_of(changed)}. {ADVICE['system']}"])

    @property
    def generation_prompt(self) -> str:
        """The end of every prompt, after the question."""
        return self._sample.prompt.rpartition(QUESTION)[2]

    @property
    def opened_thoughts(self) -> str:
        """What the prompt has of a block of thoughts that the response closes; empty if none."""
        _, opened, after = self.generation_prompt.rpartition(THINK)
        return opened + after if opened and END_THINK not in after else ""

    @cached_property
    def adds_thoughts(self) -> bool:
        """True if the template writes an empty block of thoughts to an answer without thoughts."""
        try:
            return END_THINK in self.response(ANSWER)
        except Unusable:
            return False

    @cached_property
    def unused_variables(self) -> list[str]:
        """A line for each of the recipe's variables that does not occur in the template."""
        used = self._used_variables
        return [
            f"{self._field}.chat_template_kwargs.{name}: the model's chat template has no such "
            "variable" + (f". Did you mean {close}?" if (close := nearest(name, used)) else ".")
            for name in self._renderer.variables
            if name not in used
        ]

    def prompt(self, conversation: Conversation) -> str:
        """The prompt for the question of a conversation.

        Raises: Unusable for messages that the template changes or rejects.
        """
        prompt = self._render(conversation, None)
        if not contains(prompt, conversation.question):
            raise Unusable("a problem that the chat template changes")
        if not contains(prompt, conversation.system or ""):
            raise Unusable("a system message that the chat template changes")
        earlier = [t for q, a in conversation.history for t in (q, a.rpartition(END_THINK)[2])]
        if not has_in_order(prompt, earlier):
            raise Unusable("earlier turns that the chat template changes")
        return prompt

    def response(self, answer: str, conversation: Conversation = _SENTINEL) -> str:
        """What the template writes for an answer after the prompt, its end of turn included.

        Raises: Unusable for an answer that the template changes or doesn't write after the prompt.
        """
        sample, opening = self._sample, self._sample.opening
        thinks = END_THINK in answer
        if thinks and not self.opened_thoughts and END_THINK in self.generation_prompt:
            raise Unusable(f"a {THINK} block after the empty one of the prompt{self.switch(True)}")
        if thinks and self.opened_thoughts and not answer.lstrip().startswith(THINK):
            answer = self.opened_thoughts + answer  # As a model with this prompt samples it.
        before = self.prompt(conversation).removesuffix(opening)  # Some templates write the date.
        whole = self._render(conversation, answer)
        if not whole.startswith(before):
            raise Unusable(self._misses_thoughts if self.opened_thoughts and not thinks
                           else "a start that the chat template changes")  # fmt: skip
        if not whole.endswith(sample.after_answer):
            raise Unusable("an end that the chat template changes")
        body = whole[len(before) : len(whole) - len(sample.after_answer)]
        start = self.generation_prompt.removesuffix(opening)
        if not contains(start + body, answer):
            body = _with_thoughts(answer, body)
        body = self._after_opening(body)
        if (start + opening + body).count(THINK) > max(1, answer.count(THINK)):
            raise Unusable(f"a {THINK} block that the chat template doubles")
        return body + sample.end

    def _after_opening(self, body: str) -> str:
        """An answer without what only prompts begin it with: an open or an empty block of thoughts.

        Raises: Unusable for an answer that can't follow it.
        """
        opening = self._sample.opening
        if END_THINK in opening or body.startswith(opening):
            return body.removeprefix(opening)
        if not self.opened_thoughts:
            raise Unusable(f"a start other than {opening!r}, which the prompt already has")
        if not (thoughts := body.lstrip()).startswith(THINK):
            raise Unusable(self._misses_thoughts)
        return thoughts.removeprefix(THINK).lstrip("\n")

    @property
    def _misses_thoughts(self) -> str:
        return f"no {THINK} block, which the prompt opens{self.switch(False)}"

    def switch(self, value: bool) -> str:
        """How to turn thoughts on or off, in brackets, if the template has a variable for it."""
        name = next((n for n in _SWITCHES if n in self._used_variables), None)
        return f" (set chat_template_kwargs.{name}: {str(value).lower()})" if name else ""

    @cached_property
    def _used_variables(self) -> frozenset[str]:
        # Its parser knows the tags that transformers adds to Jinja's.
        from transformers.utils.chat_template_utils import _get_template_variables

        return _get_template_variables(self._renderer.tokenizer.get_chat_template())

    @cached_property
    def _with_system(self) -> Renderer | None:
        """A renderer for messages with a system message; None if the template can't have one."""
        if self._renderer.system is not None:
            return self._renderer
        try:
            return fit_renderer(replace(self._renderer, system=SYSTEM), self._field)
        except RecipeError:
            return None

    def _render(self, conversation: Conversation, answer: str | None) -> str:
        """A conversation with its answer, or with the generation prompt."""
        renderer = self._renderer
        if conversation.system is not None:
            if self._with_system is None:
                raise Unusable("a system message, which the chat template can't have")
            renderer = replace(self._with_system, system=conversation.system)
        turns = [*conversation.history, (conversation.question, answer)]
        try:
            return renderer.render(turns, generation_prompt=answer is None)
        except Exception as error:  # a template is a program, and can reject a text
            reason = " ".join(str(error).split())[:SHOWN]
            raise Unusable(f"text that the chat template rejects ({reason})") from None


def _with_thoughts(answer: str, rest: str) -> str:
    """The answer whose thoughts the template has left out, so that it wrote only the `rest`.

    Raises: Unusable if the template has left out something else.
    """
    after = answer.rpartition(END_THINK)[2]
    if after == answer or not answer.lstrip().startswith(THINK) or packed(after) != packed(rest):
        raise Unusable("text that the chat template leaves out")
    return answer[: len(answer) - len(after.lstrip())] + rest.lstrip()


def _of_variables(error: RecipeError, renderer: Renderer, field: str) -> RecipeError | None:
    """The error as one of `chat_template_kwargs`, if there is none without them."""
    if not renderer.variables:
        return None
    try:
        fit_renderer(replace(renderer, variables={}), field)
    except RecipeError:
        return None
    lines = (line.partition(": ")[2] for line in error.problems)
    return RecipeError([f"{field}.chat_template_kwargs: {line}" for line in lines])
