"""Text to token ids and back: prompts, demonstrations and decoded responses of one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from gft_lite.recipe.sections import PromptSettings
from gft_lite.types import FinishReason
from gft_lite.utils.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Plain letters: no chat template trims, escapes or parses them.
_SENTINEL = "QZSENTINELZQ"


class PromptFormat:
    """How one recipe's prompts and responses are written in one model's tokens.

    `field` is where the recipe says so, for error texts.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: PromptSettings, field: str = "data.prompt"
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.field = field

    def render(self, problem: str) -> str:
        """The prompt as text. Raises: RecipeError if a chat template is needed and unusable."""
        # Not str.format: problems and templates are full of braces.
        text = self.prompt.template.replace("{problem}", problem)
        if self.prompt.style == "plain":
            return text
        return self._chat(self._user_turn(text), add_generation_prompt=True)

    def prompt_ids(self, problem: str) -> tuple[int, ...]:
        """The prompt's token ids, with the tokenizer's BOS once and no EOS."""
        plain = self.prompt.style == "plain"
        ids = self._encode(self.render(problem), special=plain)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        # Some tokenizers close every text; a prompt must stay open.
        if plain and eos is not None and len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]
        return tuple(ids)

    def response_ids(
        self, text: str, max_tokens: int | None = None
    ) -> tuple[tuple[int, ...], FinishReason]:
        """A demonstration's token ids, ended by `end_id`, or cut to `max_tokens` without it."""
        ids = self._encode(text, special=False)
        # Data sets often write the end token into the text.
        ids = ids if ids and ids[-1] == self.end_id else [*ids, self.end_id]
        if max_tokens is not None and len(ids) > max_tokens:
            return tuple(ids[:max_tokens]), "length"
        return tuple(ids), "stop"

    def text(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        kept = list(ids)
        while kept and kept[-1] in self.stop_ids:
            kept.pop()
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(kept, **options))

    @cached_property
    def end_id(self) -> int:
        """The token that ends a response: the chat turn's end in chat style, else EOS.

        Raises: RecipeError if there is none.
        """
        end = self._turn_end() if self.prompt.style == "chat" else None
        end = self.tokenizer.eos_token_id if end is None else end
        if not isinstance(end, int):
            rule = "must have a tokenizer with an EOS token to end responses with, got none"
            raise RecipeError([f"policy.model: {rule}. Set eos_token in tokenizer_config.json."])
        return end

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which sampling stops: `end_id`, and EOS where it is another one."""
        eos = self.tokenizer.eos_token_id
        return (self.end_id,) if eos in (None, self.end_id) else (self.end_id, eos)

    def _turn_end(self) -> int | None:
        """The first added token that the chat template writes after an assistant's words."""
        answered = [*self._user_turn("?"), {"role": "assistant", "content": _SENTINEL}]
        tail = self._chat(answered, add_generation_prompt=False).rpartition(_SENTINEL)[2]
        added = self.tokenizer.added_tokens_decoder
        return next((i for i in self._encode(tail, special=False) if i in added), None)

    def _user_turn(self, text: str) -> list[dict[str, str]]:
        system = self.prompt.system
        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, {"role": "user", "content": text}]

    def _chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            rule = "must be plain for a model without a chat template, got 'chat'"
            raise RecipeError([f"{self.field}.style: {rule}. Or train a chat-tuned model."])
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            what = "system" if self.prompt.system is not None else "style"
            rule = f"must suit the model's chat template, which says: {error}"
            raise RecipeError([f"{self.field}.{what}: {rule}. Leave {what} out."]) from None
        return str(rendered)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        # verbose=False: load_problems counts over-long prompts, a warning per row says nothing.
        return list(self.tokenizer.encode(text, add_special_tokens=special, verbose=False))
