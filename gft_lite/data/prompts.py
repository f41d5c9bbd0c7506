"""Text to token ids and back: prompts, demonstrations and responses of one tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from gft_lite.data.base import Unusable
from gft_lite.data.chat_template import ChatTemplate, Conversation
from gft_lite.recipe.sections import PromptSettings
from gft_lite.types import FinishReason, Problem, Response, Source
from gft_lite.utils.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptFormat:
    """The prompts and responses of one recipe in the tokens of one model.

    `field` is the settings' place in the recipe, for error texts; `end_ids` are end tokens of the
    model beside its EOS and the end of turn, such as those of its generation config.
    Raises: RecipeError in chat style, for a chat template that is missing or unusable.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: PromptSettings,
        field: str = "data.prompt",
        end_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self._end_ids = sorted(end_ids)
        self.chat = ChatTemplate(tokenizer, prompt, field) if prompt.style == "chat" else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines about settings that have no effect with this tokenizer."""
        return () if self.chat is None else tuple(self.chat.unused_variables)

    @property
    def opened_thoughts(self) -> str:
        """The start of a block of thoughts at the end of the prompt; empty if there is none."""
        return "" if self.chat is None else self.chat.opened_thoughts

    def render(
        self, problem: str, history: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> str:
        """The prompt as text.

        `history` has the earlier (problem, answer) turns of a conversation, `system` is its own
        system message; a plain prompt has neither.
        Raises: Unusable in chat style, for messages that the chat template changes.
        """
        if self.chat is None:
            return self._fill(problem)
        return self.chat.prompt(self._conversation(problem, history, system))

    def prompt_ids(
        self, problem: str, history: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> tuple[int, ...]:
        """The prompt's token ids, with the tokenizer's BOS once and no EOS."""
        plain = self.chat is None
        ids = self._encode(self.render(problem, history, system), special=plain)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        # Some tokenizers add EOS to every text; a prompt must stay open.
        if plain and eos is not None and len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]
        return tuple(ids)

    def problem_ids(self, problem: Problem) -> tuple[int, ...]:
        """The token ids of a problem's prompt, with the earlier turns of a conversation."""
        return self.prompt_ids(problem.text, problem.history, problem.system)

    def response_text(self, text: str, problem: Problem | None = None) -> str:
        """What follows the prompt for the demonstration `text`, up to the end of turn.

        It does not depend on the problem, but where a template has a special case: then
        `problem` gives another text. In plain style the end of turn (EOS) is not part of the text.
        Raises: Unusable for a demonstration that can't follow the prompt.
        """
        # Data sets often write the end token into the text.
        ends = tuple(filter(None, map(self._token_text, self.stop_ids)))
        while (stripped := text.rstrip()).endswith(ends):
            text = stripped.removesuffix(next(e for e in ends if stripped.endswith(e)))
        if any(end in text for end in ends):
            raise Unusable("an end token inside its text")
        if self.chat is None:
            return text
        if problem is None:
            return self.chat.response(text)
        of = self._conversation(problem.text, problem.history, problem.system)
        return self.chat.response(text, of)

    def response_ids(
        self, text: str, max_tokens: int | None = None
    ) -> tuple[tuple[int, ...], FinishReason]:
        """A demonstration's token ids, ended by `end_id`, or cut to `max_tokens` without it.

        Raises: Unusable for a demonstration that can't follow the prompt.
        """
        text = self.response_text(text)
        # Tokenised after the end of the prompt: some tokenizers treat a text's first word apart.
        before = "" if self.chat is None else self.chat.generation_prompt
        ids, prefix = (self._encode(t, special=False) for t in (before + text, before))
        # Where tokens span the boundary, the prompt's own tokens decide.
        aligned = ids[: len(prefix)] == prefix
        ids = ids[len(prefix) :] if aligned else self._encode(text, special=False)
        ids = ids if ids and ids[-1] == self.end_id else [*ids, self.end_id]
        if max_tokens is not None and len(ids) > max_tokens:
            return tuple(ids[:max_tokens]), "length"
        return tuple(ids), "stop"

    def text(self, ids: Sequence[int]) -> str:
        """The text of a response: all of its tokens but the end tokens.

        Every response is graded by this text, demonstrations and samples alike.
        """
        kept = list(ids)
        while kept and kept[-1] in self.stop_ids:
            kept.pop()
        return self._decode(kept)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Any text as tokens, without an end."""
        return tuple(self._encode(text, special=False))

    def demonstration(self, text: str, source: Source) -> Response:
        """A demonstration as a response. Raises: Unusable if it can't follow the prompt."""
        ids, finish_reason = self.response_ids(text)
        return Response(ids, self.text(ids), source, finish_reason)

    def fits(self, text: str, max_tokens: int) -> bool:
        """Whether a demonstration has at most `max_tokens` tokens, its end token included.

        Raises: Unusable if it can't follow the prompt.
        """
        # Tokenisers write at least a byte with each token; a few come from normalisation.
        if 2 * len(self.response_text(text).encode()) + 2 <= max_tokens:
            return True
        return self.response_ids(text, max_tokens)[1] == "stop"

    @cached_property
    def end_id(self) -> int:
        """The token that ends a response: the chat template's end of turn, else EOS.

        Raises: RecipeError if there is none.
        """
        end = None if self.chat is None else self.chat.end_id
        end = self.tokenizer.eos_token_id if end is None else end
        if not isinstance(end, int):
            rule = "must have a tokenizer with an EOS token to end responses with, got none"
            raise RecipeError([f"policy.model: {rule}. Set eos_token in tokenizer_config.json."])
        return end

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which sampling stops: `end_id`, EOS, and the model's other end tokens."""
        eos = self.tokenizer.eos_token_id
        others = self._end_ids if eos is None else [eos, *self._end_ids]
        return tuple(dict.fromkeys([self.end_id, *others]))

    def _fill(self, problem: str) -> str:
        # Not str.format: problems and templates are full of braces.
        return self.prompt.template.replace("{problem}", problem)

    def _conversation(
        self, problem: str, history: Sequence[tuple[str, str]], system: str | None
    ) -> Conversation:
        earlier = [(self._fill(question), answer) for question, answer in history]
        return Conversation(self._fill(problem), earlier, system)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        # verbose=False: load_problems counts long prompts, a warning for each row adds nothing.
        return list(self.tokenizer.encode(text, add_special_tokens=special, verbose=False))

    def _decode(self, ids: Sequence[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **options))

    def _token_text(self, token_id: int) -> str:
        return self._decode([token_id])
