"""The back end `transformers`: QLoRA (arXiv 2305.14314) on transformers, bitsandbytes, peft."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers.modeling_layers import GradientCheckpointingLayer

from gft_lite.policy.lora import REFERENCE, TRAINED, LoraPolicy
from gft_lite.policy.registry import model_location
from gft_lite.policy.weight_checks import (
    adapter_folder,
    check_adapter_base,
    check_missing_weights,
    check_no_pickle,
    check_plain_head,
    read_fitting_weights,
)
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.utils.errors import RecipeError


def load(
    settings: PolicySettings, seed: int = 0, rollout: RolloutSettings | None = None
) -> LoraPolicy:
    """Load base, tokenizer and adapter; `rollout` is not used.

    Raises: RecipeError if the recipe's model or adapter can't be loaded.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    device = settings.resolved_device(cuda_available=torch.cuda.is_available())
    dtype = getattr(torch, settings.resolved_dtype(device))
    where = model_location(settings.model)
    check_no_pickle(Path(where), "*.safetensors", "policy.model")
    common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **common)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_quantization(settings, dtype),
            attn_implementation=settings.attention,
            use_safetensors=True,
            output_loading_info=True,
            **common,
        )
    # Broken tokenizers, configurations and weights raise any of these.
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise RecipeError(
            [f"policy.model: must be a model folder or hub id that loads, "
             f"got {settings.model!r} ({reason})"]
        ) from error  # fmt: skip
    base, report = loaded
    if not tokenizer.encode("1", add_special_tokens=False):
        rule = "must have a tokenizer with a vocabulary, such as tokenizer.json"
        raise RecipeError([f"policy.model: {rule}, got {settings.model!r} without."])
    check_missing_weights(base, report, settings.model)
    check_plain_head(base.config)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # A forward pass in eval mode would repack the weights for a bf16 kernel that rounds.
            module.support_avx512bf16_for_cpu = False
    model = _adapt(base, settings, seed)
    _checkpoint_layers(base, settings)
    if settings.offload_embedding is True:
        _keep_on_cpu(base)
    return LoraPolicy(model, tokenizer, settings, dtype)


def _quantization(
    settings: PolicySettings, dtype: torch.dtype
) -> transformers.BitsAndBytesConfig | None:
    """The configuration of `policy.quantization`, None for an unquantised base."""
    if settings.quantization == "none":
        return None
    if settings.quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def _adapt(base: Any, settings: PolicySettings, seed: int) -> PeftModel:
    """Add an adapter to the base: a new one, initialised from `seed`, or `policy.adapter`."""
    model: PeftModel
    if settings.adapter is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LoraConfig(
                r=settings.lora.rank,
                lora_alpha=settings.lora.alpha,
                lora_dropout=settings.lora.dropout,
                target_modules=settings.lora.target_modules,
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(base, config)
    else:
        model = _start_from(base, settings.adapter, settings)
    for name, parameter in model.named_parameters():
        if f".{TRAINED}." in name:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Autocast casts the masters to the activations' dtype; peft would do the opposite.
            module.cast_input_dtype_enabled = False
    return model


def _checkpoint_layers(base: Any, settings: PolicySettings) -> None:
    """Recompute the first `policy.gradient_checkpointing` layers in the backward pass."""
    wanted = settings.gradient_checkpointing
    if not wanted:
        return
    base.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[wanted if type(wanted) is int else len(layers) :]:
        layer.gradient_checkpointing = False


def _keep_on_cpu(base: Any) -> None:
    """Keep the input embedding in the CPU's memory and copy only the rows that are looked up."""
    embedding = base.get_input_embeddings()
    if embedding.weight is base.get_output_embeddings().weight:
        raise RecipeError(
            ["policy.offload_embedding: must be false for a model whose output head is its input "
             "embedding, got true."]
        )  # fmt: skip
    device = embedding.weight.device
    embedding.to("cpu")
    embedding.register_forward_pre_hook(lambda _, inputs: tuple(ids.cpu() for ids in inputs))
    embedding.register_forward_hook(lambda _module, _inputs, states: states.to(device))


def _start_from(base: Any, adapter: str, settings: PolicySettings) -> PeftModel:
    """Load `policy.adapter` as the trained adapter and, if set, as the reference."""
    try:
        found = adapter_folder(adapter)
        model = PeftModel.from_pretrained(base, found, is_trainable=True)
        check_adapter_base(model.peft_config[TRAINED], adapter, settings)
        read_fitting_weights(model, TRAINED, found, "policy.adapter")
        if settings.reference == "adapter":
            model.load_adapter(found, adapter_name=REFERENCE)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise RecipeError(
            [f"policy.adapter: must be a PEFT adapter of {settings.model}, "
             f"got {adapter!r} ({reason})"]
        ) from error  # fmt: skip
    rank = getattr(model.peft_config[TRAINED], "r", None)
    if rank != settings.lora.rank:
        raise RecipeError(
            [f"policy.lora.rank: must be {rank}, the rank of {adapter}, "
             f"got {settings.lora.rank}"]
        )  # fmt: skip
    return model
