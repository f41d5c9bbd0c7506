"""The final adapter with what its readers need: the tokenizer and the end tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gft_lite.policy.base import Policy
from gft_lite.utils.files import read_json

GENERATION_CONFIG = "generation_config.json"


def save_final_adapter(policy: Policy, folder: Path) -> None:
    """Write the adapter, the tokenizer with its chat template, and a generation config.

    The generation config names all tokens that end a response, of which the base's own may lack
    the end of a turn.
    """
    from transformers import GenerationConfig

    policy.save_adapter(folder, with_tokenizer=True)
    ends = sorted(policy.eos_ids)
    GenerationConfig(eos_token_id=ends, pad_token_id=policy.pad_id).save_pretrained(folder)


def read_end_tokens(adapter: Path) -> dict[int, str]:
    """The ids and texts of the end tokens that `save_final_adapter` wrote; empty if it did not.

    Raises: UserError if the generation config is damaged.
    """
    from transformers import AutoTokenizer

    file = adapter / GENERATION_CONFIG
    if not file.exists():
        return {}
    advice = "Restore the file, or remove it."
    ids = read_json(file, _end_ids, "must have the end tokens as eos_token_id", advice)
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    return {i: tokenizer.convert_ids_to_tokens(i) for i in ids}


def _end_ids(value: Any) -> list[int]:
    ids = value["eos_token_id"]
    return [int(i) for i in (ids if isinstance(ids, list) else [ids])]
