"""The back end `unsloth`: its kernels and, for rollout.engine unsloth, vLLM on shared weights."""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from gft_lite.policy.adapter_config import lora_settings, read_adapter_config
from gft_lite.policy.batching import Layout
from gft_lite.policy.kept_base import KeptBase
from gft_lite.policy.load_errors import describe_error
from gft_lite.policy.lora import REFERENCE, TRAINED, LoraPolicy
from gft_lite.policy.model_checks import CheckedModel, check_model
from gft_lite.policy.scoring import autocast
from gft_lite.policy.vllm_process import engine_environment, isolated_process_state
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.utils.errors import RecipeError, short_repr


class UnslothPolicy(LoraPolicy):
    """Unsloth separates packed rows by their positions; its own kernels take the cache as tuples.

    `_tuples` is True once a forward pass has returned its cache as tuples.
    """

    _tuples = False

    def _choose_layout(self) -> Layout:
        """`packed` if supported, else `padded`. Raises: RecipeError."""
        wanted = self.settings.layout
        if wanted != "padded" and self._supports("packed"):
            return "packed"
        if wanted == "packed":
            raise RecipeError(
                [f"policy.layout: must be one that {self.config.model_type} supports with "
                 "backend unsloth, got 'packed'. Use auto."]
            )  # fmt: skip
        return "padded"

    def next_token_logits(self, input_ids: Tensor, cache: Any, **kwargs: Tensor) -> Tensor:
        """fp32 logits [B, V] of the token after `input_ids` [B, S], continuing `cache`."""
        past = None  # Without a cache, Unsloth returns one of the model's kind.
        if cache.get_seq_length():
            past = tuple((x.keys, x.values) for x in cache.layers) if self._tuples else cache
        with autocast(self.device, self.dtype):
            out = self._decoder(input_ids=input_ids, past_key_values=past, use_cache=True, **kwargs)
            found = out.past_key_values
            self._tuples = not isinstance(found, Cache)
            cache.layers = [_layer(*x) for x in found] if self._tuples else found.layers
        return self.head.logits(out.last_hidden_state[:, -1])


def _layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    """A layer of transformers' cache from Unsloth's tuple."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def load(
    settings: PolicySettings,
    seed: int = 0,
    rollout: RolloutSettings | None = None,
    kept: KeptBase | None = None,
) -> UnslothPolicy:
    """Load base, tokenizer and adapter and, for rollout.engine unsloth, vLLM on the same weights.

    `kept` is not used: Unsloth changes the modules of its base for the adapter.
    Raises: RecipeError if the recipe's model or adapter can't be loaded.
    """
    # Unsloth's usage statistics download a file from the hub.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    checked = check_model(settings)
    try:
        with torch.random.fork_rng():
            base = _base(checked, settings, seed, rollout)
            model = _adapt(base, checked.adapter, settings, seed)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RecipeError(
            [f"policy.backend: unsloth must be able to load {settings.model!r} and the adapter "
             f"{short_repr(settings.adapter)}, got {describe_error(error)}. Or leave "
             "policy.backend out."]
        ) from error  # fmt: skip
    dtype = base.get_input_embeddings().weight.dtype
    # Unsloth itself moves its checkpoints to RAM.
    own = settings.model_copy(update={"offload_checkpoints": False})
    policy = UnslothPolicy(model, checked.tokenizer, own, dtype)
    if checked.adapter:
        policy.load_adapter(checked.adapter)
        if settings.reference == "adapter":
            model.load_adapter(checked.adapter, adapter_name=REFERENCE)
    return policy


def _base(
    checked: CheckedModel, settings: PolicySettings, seed: int, rollout: RolloutSettings | None
) -> Any:
    """The base as Unsloth loads it, with the generation config of its files."""
    from unsloth import FastLanguageModel

    where, common = checked.location, checked.hub_options
    limit = transformers.AutoConfig.from_pretrained(where, **common).max_position_embeddings
    served = _served(settings, rollout)
    environment = engine_environment(torch.device("cuda"))
    with isolated_process_state(environment) if served else nullcontext():
        base, _ = FastLanguageModel.from_pretrained(
            model_name=where,
            use_exact_model_name=True,  # Not a copy that Unsloth quantised.
            max_seq_length=min(settings.context or limit, limit),  # Unsloth truncates longer rows.
            dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
            load_in_4bit=settings.quantization == "nf4",
            device_map={"": settings.resolved_device(cuda_available=True)},
            use_gradient_checkpointing=_checkpointing(settings),
            offload_embedding=False,
            fix_tokenizer=False,
            use_safetensors=True,
            random_state=seed,
            **served,
            **common,
        )
    if served:
        # A model built on vLLM's weights lacks the EOS tokens of generation_config.json.
        with suppress(OSError):
            listed: Any = transformers.GenerationConfig
            base.generation_config = listed.from_pretrained(where, **common)
    return base


def _served(settings: PolicySettings, rollout: RolloutSettings | None) -> dict[str, Any]:
    """Unsloth's arguments for a vLLM that shares the weights; none for other engines."""
    if rollout is None or rollout.engine != "unsloth":
        return {}
    share = 0.5 if rollout.gpu_memory == "auto" else rollout.gpu_memory  # Unsloth's default.
    return {
        "fast_inference": True,
        "gpu_memory_utilization": share,
        "max_lora_rank": settings.lora.rank,
        "max_num_seqs": rollout.rows,
        "enforce_eager": rollout.eager,
        "training": False,  # Log-probs of the untempered distribution.
    }


def _adapt(base: Any, adapter: Path | None, settings: PolicySettings, seed: int) -> Any:
    """Add a new adapter to the base, with the target modules of `policy.adapter` if it is set."""
    from unsloth import FastLanguageModel

    lora = settings.lora
    targets = lora_settings(read_adapter_config(adapter)).target_modules if adapter else None
    targets = targets or lora.target_modules
    model = FastLanguageModel.get_peft_model(
        base,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        use_gradient_checkpointing=_checkpointing(settings),
        random_state=seed,
    )
    for name, parameter in model.named_parameters():
        if f".{TRAINED}." in name:
            parameter.data = parameter.data.float()
    return model


def _checkpointing(settings: PolicySettings) -> bool | str:
    """Unsloth's argument for gradient checkpointing; "unsloth" offloads checkpoints to RAM."""
    if settings.offload_checkpoints and settings.gradient_checkpointing:
        return "unsloth"
    return bool(settings.gradient_checkpointing)
