"""Checks of chat templates before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gft_lite.data.prompts import PromptFormat
from gft_lite.policy.load_errors import LOAD_ERRORS
from gft_lite.policy.registry import model_location
from gft_lite.utils.errors import RecipeError

if TYPE_CHECKING:
    from gft_lite.recipe.sections import PolicySettings, PromptSettings


def load_tokenizer(policy: PolicySettings) -> Any:
    """The tokenizer of the policy's base. Raises: one of LOAD_ERRORS."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(
        model_location(policy.model), revision=policy.revision,
        trust_remote_code=policy.trust_remote_code,
    )  # fmt: skip


def check_chat_templates(policy: PolicySettings, prompts: Mapping[str, PromptSettings]) -> None:
    """Require that the model's chat template suits each prompt; `prompts` are by field.

    A tokenizer that can't be read is left to `load_policy`, which says what is wrong with it.
    Raises: RecipeError with the errors of all prompts, once for equal ones.
    """
    chats = {field: prompt for field, prompt in prompts.items() if prompt.style == "chat"}
    if not chats:
        return
    try:
        tokenizer = load_tokenizer(policy)
    except LOAD_ERRORS:
        return
    checked: list[PromptSettings] = []
    errors: list[str] = []
    for field, prompt in chats.items():
        if prompt in checked:
            continue
        checked.append(prompt)
        try:
            PromptFormat(tokenizer, prompt, field)
        except RecipeError as error:
            errors += error.problems
    if errors:
        raise RecipeError(errors)
