"""The back end `transformers`: QLoRA (arXiv 2305.14314) on transformers, bitsandbytes, peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from gft_lite.policy.adapter_checks import lora_config
from gft_lite.policy.kept_base import KeptBase
from gft_lite.policy.lora import REFERENCE, TRAINED, LoraPolicy
from gft_lite.policy.model_checks import CheckedModel, check_model
from gft_lite.policy.model_config import report_errors
from gft_lite.policy.principal import start_at_factors, tie_blocks
from gft_lite.policy.weight_checks import check_missing_weights
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.utils.progress import track


def load(
    settings: PolicySettings,
    seed: int = 0,
    rollout: RolloutSettings | None = None,
    kept: KeptBase | None = None,
) -> LoraPolicy:
    """Load base, tokenizer and adapter, or take the base from `kept`; `rollout` is not used.

    Raises: RecipeError if the recipe's model or adapter can't be loaded.
    """
    device = settings.resolved_device(cuda_available=torch.cuda.is_available())
    dtype = getattr(torch, settings.resolved_dtype(device))
    checked = check_model(settings)
    load = partial(_load_base, settings, checked, device, dtype)
    base = kept.take(settings, load) if kept else load()
    model = add_adapter(base, settings, checked.adapter, seed)
    checkpoint_layers(base, settings)
    return LoraPolicy(model, checked.tokenizer, settings, dtype)


def _load_base(
    settings: PolicySettings, checked: CheckedModel, device: str, dtype: torch.dtype
) -> Any:
    """The quantised base. Raises: RecipeError."""
    with report_errors(settings.model), _report_weights():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checked.location,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization_config_of(settings, dtype),
            attn_implementation=settings.attention,
            use_safetensors=True,
            output_loading_info=True,
            **checked.hub_options,
        )
    base, report = loaded
    check_missing_weights(base, report, settings.model)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # A forward pass in eval mode would repack the weights for a bf16 kernel that rounds.
            module.support_avx512bf16_for_cpu = False
    if settings.offload_embedding is True:
        keep_embedding_on_cpu(base)
    return base


@contextmanager
def _report_weights() -> Iterator[None]:
    """Show the weights that transformers reads as the progress of the current phase."""
    before = transformers.utils.logging.set_tqdm_hook(lambda _, args, kwargs: _Bar(*args))
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(before)


class _Bar(transformers.utils.logging.EmptyTqdm):
    """A progress bar of transformers, which reports instead of printing."""

    def __iter__(self) -> Iterator[Any]:
        return track(list(self._iterator or ()), "weights")


def quantization_config_of(
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


def add_adapter(base: Any, settings: PolicySettings, adapter: Path | None, seed: int) -> PeftModel:
    """Add an adapter to the base: a new one, initialised from `seed`, or `policy.adapter`."""
    model: PeftModel
    if adapter is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(base, lora_config(base, settings.lora))
            if settings.lora.init != "default":
                start_at_factors(model, TRAINED, settings.lora.init)
    else:
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        if settings.reference == "adapter":
            model.load_adapter(adapter, adapter_name=REFERENCE)
    for name, parameter in model.named_parameters():
        if f".{TRAINED}." in name:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Autocast casts the masters to the activations' dtype; peft would do the opposite.
            module.cast_input_dtype_enabled = False
    if settings.lora.init != "default":
        tie_blocks(model, TRAINED)
    return model


def checkpoint_layers(base: Any, settings: PolicySettings) -> None:
    """Recompute the first `policy.gradient_checkpointing` layers in the backward pass."""
    wanted = settings.gradient_checkpointing
    if not wanted:
        return
    base.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[wanted if type(wanted) is int else len(layers) :]:
        layer.gradient_checkpointing = False


def keep_embedding_on_cpu(base: Any) -> None:
    """Keep the input embedding in the CPU's memory and copy only the rows that are looked up."""
    embedding = base.get_input_embeddings()
    device = embedding.weight.device
    embedding.to("cpu")
    embedding.register_forward_pre_hook(lambda _, inputs: tuple(ids.cpu() for ids in inputs))
    embedding.register_forward_hook(lambda _module, _inputs, states: states.to(device))
