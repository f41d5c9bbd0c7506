"""Code shared by the in-process and the HTTP vLLM engine: options, requests, adapter checks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gft_lite.planning.kv_cache import (
    BLOCK_TOKENS,
    cpu_kv_cache,
    kv_bytes_per_token,
    smallest_kv_cache,
)
from gft_lite.rollout.base import Request, RolloutError, Sampling
from gft_lite.utils.cpu import has_bf16_instructions
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.imports import installed_version
from gft_lite.utils.memory import free_ram

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy, ServedBase
    from gft_lite.recipe.lora_section import LoraSettings
    from gft_lite.recipe.sections import DtypeName, RolloutSettings


MAX_TEMPERATURE = 2.0
TESTED_VLLM = "0.32."  # The version whose functions `vllm_cpu_lora` replaces.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks of vLLM 0.32

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VllmRequest:
    """A prompt and the arguments of vLLM's `SamplingParams` for one completion of it."""

    prompt_ids: Sequence[int]
    parameters: Mapping[str, Any]


# --- engine options ----------------------------------------------------------------------------


def engine_options(settings: RolloutSettings, policy: Policy) -> dict[str, Any]:
    """vLLM's engine arguments, without the model.

    Raises: RecipeError if rank, temperature or KV cache are outside vLLM's limits.
    """
    dtype = engine_dtype(settings, policy)
    options: dict[str, Any] = {
        "dtype": _name(dtype),
        "revision": policy.settings.revision,
        "trust_remote_code": policy.settings.trust_remote_code,
        "max_model_len": policy.context,
        "max_num_seqs": settings.rows,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": _served_rank(policy.settings.lora),
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
    }
    if settings.temperature > MAX_TEMPERATURE:
        raise RecipeError(
            [f"rollout.temperature: must be at most {MAX_TEMPERATURE:g} with vLLM, got "
             f"{settings.temperature:g}. Lower it or set rollout.engine=transformers."]
        )  # fmt: skip
    kv_cache = _kv_cache(settings, policy, dtype)
    if settings.base == "plugin":
        _check_plugin(policy, dtype)
        options["quantization"] = "bitsandbytes"
    if policy.device.type == "cpu":
        return options | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": kv_cache,
            "block_size": BLOCK_TOKENS,
            **lora_worker(),
        }
    return options | {
        "enforce_eager": settings.eager,
        "enable_sleep_mode": settings.sleep,
        "gpu_memory_utilization": _gpu_share(settings.gpu_memory, policy.device),
        "kv_cache_memory_bytes": kv_cache,
    }


def start_inputs(settings: RolloutSettings, policy: Policy) -> dict[str, Any]:
    """What an engine is started with, by value; sizes from free memory stand as in the recipe."""
    own = policy.settings
    return engine_options(settings, policy) | {
        "gpu_memory_utilization": settings.gpu_memory,
        "kv_cache_memory_bytes": settings.kv_cache_mib,
        "base": settings.base,
        "model": (own.model, own.quantization, own.double_quantization),
        "trainer": (str(policy.device), policy.dtype),
        "end_ids": policy.eos_ids,
    }


def engine_dtype(settings: RolloutSettings, policy: Policy) -> torch.dtype:
    """The dtype in which a vLLM that the run starts computes."""
    name = settings.resolved_dtype(
        _name(policy.dtype), policy.device.type, cpu_has_bf16=has_bf16_instructions()
    )
    return getattr(torch, name)


def describe_base(base: ServedBase, settings: RolloutSettings, policy: Policy) -> str:
    """The served copy of the base and its dtype, for the console and the model card."""
    dtype = engine_dtype(settings, policy)
    chosen = settings.dtype == "auto" and dtype != policy.dtype
    note = f" (rollout.dtype: auto; the policy is in {_name(policy.dtype)})" if chosen else ""
    return f"{base.about} in {_name(dtype)}{note}"


def _name(dtype: torch.dtype) -> DtypeName:
    return cast("DtypeName", str(dtype).removeprefix("torch."))


def lora_worker() -> dict[str, str]:
    """vLLM's argument for our worker on CPUs; none for a vLLM that it was not compared with."""
    version = installed_version("vllm") or "unknown"
    if version.startswith(TESTED_VLLM):
        return {"worker_cls": "gft_lite.rollout.vllm_cpu_lora.CpuLoraWorker"}
    _log.debug("LoRA on the CPU is vLLM's own: vLLM is %s, not %s*.", version, TESTED_VLLM)
    return {}


def _kv_cache(settings: RolloutSettings, policy: Policy, dtype: torch.dtype) -> int | None:
    """Bytes of vLLM's KV cache; None leaves it to vLLM's share of the card.

    Raises: RecipeError if it can't hold one sequence of `policy.context` tokens.
    """
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = kv_bytes_per_token(config.num_hidden_layers, heads, size, dtype.itemsize)
    if settings.kv_cache_mib == "auto":
        if policy.device.type != "cpu":
            return None
        return cpu_kv_cache(per_token, policy.context, settings.rows, free_ram())
    least = math.ceil(smallest_kv_cache(per_token, policy.context) / 2**20)
    if settings.kv_cache_mib < least:
        raise RecipeError(
            [f"rollout.kv_cache_mib: must be at least {least} to hold one sequence of "
             f"policy.context {policy.context}, got {settings.kv_cache_mib}."]
        )  # fmt: skip
    return settings.kv_cache_mib << 20


def _gpu_share(gpu_memory: Literal["auto"] | float, device: torch.device) -> float:
    """The share of the card for vLLM: from the recipe or the memory plan, else 80% of what is free.

    Evaluations and models of unknown shape have no memory plan.
    """
    if not isinstance(gpu_memory, str):
        return gpu_memory
    free, card = torch.cuda.mem_get_info(device)
    return 0.8 * free / card


def _check_plugin(policy: Policy, dtype: torch.dtype) -> None:
    """Raises: RecipeError unless vLLM's bitsandbytes plugin quantises as the trainer does."""
    instead = "or rollout.base=nf4_dequantised"
    settings = policy.settings
    if not entry_points(group="vllm.general_plugins", name="bitsandbytes"):
        raise RecipeError(
            ["rollout.base: plugin needs the package vllm-bnb-plugin, which is not installed. "
             f"pip install --no-deps vllm-bnb-plugin==0.0.3, {instead}."]
        )  # fmt: skip
    if settings.quantization != "nf4" or not settings.double_quantization:
        raise RecipeError(
            ["policy.quantization: must be nf4 with policy.double_quantization for rollout.base "
             f"plugin, which quantises so, got {settings.quantization} with "
             f"{settings.double_quantization}. Set both, {instead}."]
        )  # fmt: skip
    if dtype == torch.float32:
        raise RecipeError(
            ["rollout.dtype: must be bfloat16 or float16 for rollout.base plugin, got float32. "
             f"Set rollout.dtype=bfloat16, {instead}."]
        )  # fmt: skip


def _served_rank(lora: LoraSettings) -> int:
    """The smallest rank that vLLM can be started with and that fits the policy's adapter."""
    if lora.use_dora:
        raise RecipeError(
            ["policy.lora.use_dora: must be false with vLLM, which can't serve DoRA, got true. "
             "Set rollout.engine=transformers."]
        )  # fmt: skip
    rank = lora.trained.largest_rank
    if rank > max(LORA_RANKS):
        twice = f", {rank} with policy.lora.init {lora.init}" if lora.trained is not lora else ""
        raise RecipeError(
            [f"policy.lora.rank: must be at most {max(LORA_RANKS)} with vLLM, got "
             f"{lora.largest_rank}{twice}. Lower it or set rollout.engine=transformers."]
        )  # fmt: skip
    return min(r for r in LORA_RANKS if r >= rank)


# --- requests ----------------------------------------------------------------------------------


def sampling_requests(
    requests: Sequence[Request], sampling: Sampling, context: int, end_ids: Sequence[int]
) -> list[VllmRequest]:
    """One vLLM request per seed, in order.

    Raises: RolloutError for a prompt that is empty or leaves no token of the context free.
    """
    common = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": list(sampling.stop),
        "stop_token_ids": list(end_ids),
        "ignore_eos": True,  # Use the policy's end tokens, not those in the served folder.
        "skip_special_tokens": False,
        "logprobs": 0,
    }
    free = [_free_tokens(len(request.prompt_ids), context) for request in requests]
    # One vLLM request per seed: with n > 1 vLLM derives the seeds by counting up from the first.
    return [
        VllmRequest(
            request.prompt_ids,
            common | {"max_tokens": min(sampling.max_tokens, limit), "seed": _fold_seed(seed)},
        )
        for request, limit in zip(requests, free, strict=True)
        for seed in request.seeds
    ]


def scoring_request(
    prompt_ids: Sequence[int], token_ids: Sequence[int], context: int
) -> VllmRequest:
    """A vLLM request whose prompt is prompt and completion, with log-probs of the prompt.

    Raises: RolloutError if both leave no token of the context free.
    """
    ids = [*prompt_ids, *token_ids]
    _free_tokens(len(prompt_ids), context)
    _free_tokens(len(ids), context)
    # vLLM must generate one token; it does not use the prefix cache when it scores a prompt.
    return VllmRequest(ids, {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0})


def _free_tokens(length: int, context: int) -> int:
    """The tokens of the context after a prompt of `length`. Raises: RolloutError if none."""
    if not 1 <= length < context:
        raise RolloutError(
            f"prompt: must have 1 to {context - 1} tokens, got {length}. "
            "Raise policy.context or shorten the prompt."
        )
    return context - length


def _fold_seed(seed: int) -> int:
    """A 63-bit seed whose low 32 bits depend on all bits of `seed`; smaller seeds are unchanged.

    vLLM treats -1 as no seed, and torch's CPU generator reads the low 32 bits only.
    """
    seed %= 2**63
    return seed ^ seed >> 32


# --- adapters ----------------------------------------------------------------------------------


def adapter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model's active adapter is saved as."""
    adapter = f".{model.active_adapter}"
    return {
        name.replace(adapter, ""): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if ".lora_" in name and f"{adapter}." in f"{name}."
    }


def check_adapter(adapter: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Raises: RolloutError unless the saved adapter has these tensors, all of them finite.

    vLLM would ignore unknown names and serve the base, and accepts NaN and truncated tensors.
    """
    try:
        tensors = load_file(adapter / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RolloutError(
            f"adapter: must be a folder with a PEFT adapter, got {adapter} ({error})."
        ) from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(n for n in shapes.keys() | found if shapes.get(n) != found.get(n))
    if wrong:
        raise RolloutError(
            f"adapter: must have the policy's modules and rank, got {adapter}, in which "
            f"{len(wrong)} tensors differ: {wrong[0]} is {found.get(wrong[0], 'missing')} "
            f"instead of {shapes.get(wrong[0], 'absent')}."
        )
    if bad := [n for n, tensor in tensors.items() if not tensor.to(dtype).isfinite().all()]:
        raise RolloutError(f"adapter: must be finite in {dtype}, got {adapter} with {bad[0]}.")
