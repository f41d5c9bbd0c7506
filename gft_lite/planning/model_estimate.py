"""Sizes of a model of a family without formulas, from the keys that most config.json have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Names of the same size in different families, the most common first.
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size",
                          "mlp_hidden_size"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len",
                                "seq_length", "max_sequence_length"),
    "head_dim": ("head_dim", "head_size"),
}  # fmt: skip
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")


def estimate(config: Mapping[str, Any]) -> tuple[dict[str, Any], int, tuple[str, ...]]:
    """A config of type llama, the parameters of experts beside it, and what was assumed.

    Sizes that the config does not have under a known name are missing.
    """
    kind = config.get("model_type")
    assumed = [f"no tested formulas for type {kind!r}: assumed a dense decoder with a gated MLP, "
               "as llama is"]  # fmt: skip
    part = next((name for name in _TEXT_PARTS if isinstance(config.get(name), Mapping)), None)
    text: Mapping[str, Any] = config if part is None else {**config, **config[part]}
    if part:
        assumed.append(f"only {part} is counted, not an image or sound tower")
    found: dict[str, Any] = {"model_type": "llama"}
    for key, names in _NAMES.items():
        value = _first(text, names)
        if isinstance(value, list) and value and all(type(v) is int for v in value):
            value = max(value)
            assumed.append(f"every layer has the largest {key} of its list, {value:,}")
        if value is not None:
            found[key] = value
    if text.get("multi_query") is True:
        found["num_key_value_heads"] = 1
    if "intermediate_size" not in found and type(found.get("hidden_size")) is int:
        found["intermediate_size"] = 4 * found["hidden_size"]
        assumed.append(f"an MLP four times as wide as the model, {found['intermediate_size']:,}")
    tied = text.get("tie_word_embeddings")
    found["tie_word_embeddings"] = bool(tied)
    if tied is None:
        assumed.append("an output head of its own")
    others = _add_experts(text, found, assumed)
    return found, others, tuple(assumed)


def _add_experts(text: Mapping[str, Any], found: dict[str, Any], assumed: list[str]) -> int:
    """Make the MLP that of the experts of a token; the parameters of all other experts."""
    experts, width = _first(text, _EXPERTS), _first(text, _EXPERT_WIDTHS)
    sizes = (experts, width, found.get("hidden_size"), found.get("num_hidden_layers"))
    if not all(type(size) is int and size > 0 for size in sizes) or experts == 1:
        return 0
    used = min(_first(text, ("num_experts_per_tok", "moe_topk", "top_k")) or 2, experts)
    shared = text.get("shared_expert_intermediate_size") or 0
    shared += (text.get("n_shared_experts") or text.get("num_shared_experts") or 0) * width
    found["intermediate_size"] = used * width + shared
    assumed.append(f"{used} of {experts} experts compute a token; the others are not quantised "
                   "and have no adapter")  # fmt: skip
    return found["num_hidden_layers"] * 3 * found["hidden_size"] * width * (experts - used)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)
