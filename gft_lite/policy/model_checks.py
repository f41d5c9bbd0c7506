"""Checks of `policy.model` and its tokenizer before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from gft_lite.policy.adapter_checks import check_adapter, check_lora
from gft_lite.policy.model_config import read_config, report_errors
from gft_lite.policy.model_files import check_model_files
from gft_lite.policy.registry import model_location
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import RecipeError


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A recipe's base, tokenizer and adapter, found to fit each other.

    `location` is the base's folder or hub id, `adapter` the folder of `policy.adapter`, and
    `hub_options` are the arguments of every `from_pretrained`.
    """

    location: str
    hub_options: dict[str, Any]
    tokenizer: Any
    adapter: Path | None


def check_model(settings: PolicySettings) -> CheckedModel:
    """Read config and tokenizer of the base, and check them, the LoRA settings and the adapter.

    Raises: RecipeError.
    """
    where = model_location(settings.model)
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    check_model_files(settings)
    with report_errors(settings.model):
        config = read_config(where, settings, options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        generation = _read_generation_config(where, config, settings.revision)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            build = transformers.AutoModelForCausalLM.from_config
            skeleton = build(config, trust_remote_code=settings.trust_remote_code)
        vocabulary = skeleton.get_input_embeddings().num_embeddings
    _check_config(config, settings)
    _check_attention(skeleton, settings)
    _check_tokenizer(tokenizer, vocabulary, settings.model)
    find_eos_ids(generation, tokenizer, vocabulary, settings.model)
    _check_offload(skeleton, settings)
    if settings.adapter is None:
        check_lora(skeleton, settings)
        return CheckedModel(where, options, tokenizer, None)
    return CheckedModel(where, options, tokenizer, check_adapter(skeleton, settings))


def _read_generation_config(where: str, config: Any, revision: str | None) -> Any:
    """The generation config in the model's files, or the one that its config implies."""
    reader: Any = transformers.GenerationConfig
    try:
        return reader.from_pretrained(where, revision=revision)
    except OSError:
        if (Path(where) / "generation_config.json").is_file():
            raise  # transformers itself would ignore a broken file, and the EOS tokens in it.
        return reader.from_model_config(config)


def _check_config(config: Any, settings: PolicySettings) -> None:
    """Require unscaled logits.

    `OutputHead` does not rescale the output of the head. Raises: RecipeError.
    """
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config.get_text_config(), name, None) not in (None, 1, 1.0):
            raise RecipeError(
                [f"policy.model: must have a plain output head, got {config.model_type} with "
                 f"{name}. Choose another model."]
            )  # fmt: skip


def longest_context(config: Any) -> int:
    """Tokens of the longest sequence on which trainer and engine are the same function.

    LongRoPE (Phi) changes the frequencies of ALL tokens with the length: of a micro-batch's longest
    row in transformers, of the whole context in vLLM. Only within the original context do both
    use the same ones.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return getattr(config, "max_position_embeddings", None) or 1 << 30


def _check_attention(skeleton: Any, settings: PolicySettings) -> None:
    """Require that the model supports `policy.attention`. Raises: RecipeError."""
    if settings.attention == "sdpa" and not skeleton._supports_sdpa:
        raise RecipeError(
            [f"policy.attention: must be eager for a model of type {skeleton.config.model_type}, "
             "got sdpa. Set policy.attention=eager."]
        )  # fmt: skip


def _check_tokenizer(tokenizer: Any, vocabulary: int, model: str) -> None:
    """Require a vocabulary that the embedding covers. Raises: RecipeError.

    transformers adds pad and unknown tokens that the files lack; neither occurs in a text.
    """
    if not tokenizer.encode("1", add_special_tokens=False):
        rule = "must have a tokenizer with a vocabulary, such as tokenizer.json"
        raise RecipeError([f"policy.model: {rule}, got {model!r} without. Download it again."])
    tokens = tokenizer.get_vocab()
    # find_eos_ids checks the EOS token.
    exempt = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    beyond = sorted((i, token) for token, i in tokens.items() if i >= vocabulary)
    beyond = [each for each in beyond if each[0] not in exempt]
    if beyond:
        number, token = beyond[0]
        raise RecipeError(
            [f"policy.model: must have an embedding for each token of its tokenizer, got {model!r} "
             f"with {len(tokens)} tokens and {vocabulary} embeddings, none of them for {token!r} "
             f"({number}). Resize the embedding, or use the tokenizer of the model's training."]
        )  # fmt: skip


def find_eos_ids(generation: Any, tokenizer: Any, vocabulary: int, model: str) -> frozenset[int]:
    """The EOS tokens of generation config and tokenizer.

    Raises: RecipeError for one that is not among the `vocabulary` embeddings.
    """
    listed = generation.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    found = [i for i in (*listed, tokenizer.eos_token_id) if i is not None]
    wrong = [i for i in found if type(i) is not int or not 0 <= i < vocabulary]
    if wrong:
        raise RecipeError(
            [f"policy.model: must have its EOS token among its {vocabulary} tokens, got {model!r} "
             f"with id {wrong[0]!r}. Set eos_token in tokenizer_config.json and eos_token_id in "
             "generation_config.json."]
        )  # fmt: skip
    return frozenset(found)


def _check_offload(skeleton: Any, settings: PolicySettings) -> None:
    """Require an input embedding of its own for policy.offload_embedding. Raises: RecipeError."""
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if settings.offload_embedding is True and embedding.weight is head.weight:
        raise RecipeError(
            ["policy.offload_embedding: must be false for a model whose output head is its input "
             "embedding, got true. Set policy.offload_embedding=false."]
        )  # fmt: skip
