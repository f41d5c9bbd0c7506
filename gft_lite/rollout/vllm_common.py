"""What the vLLM engines in this process and behind HTTP share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gft_lite.rollout.base import Request, RolloutError, Sampling

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import RolloutSettings


Job = tuple[Sequence[int], dict[str, Any]]  # A prompt and its parameters, in vLLM's names.

CPU_KV_CACHE = 64 << 20
CPU_BLOCK = 32  # vLLM's 128 would leave shorter prompts out of the prefix cache.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks of vLLM 0.32


def engine_options(settings: RolloutSettings, policy: Policy) -> dict[str, Any]:
    """vLLM's arguments, but for the model. Raises: RolloutError for a rank or memory unfit."""
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * policy.dtype.itemsize
    # vLLM keeps one block for itself.
    least = per_token * (math.ceil(policy.context / CPU_BLOCK) + 1) * CPU_BLOCK
    asked = None if settings.kv_cache_mib is None else settings.kv_cache_mib << 20
    if asked is not None and asked < least:
        raise RolloutError(
            f"rollout.kv_cache_mib: must be at least {math.ceil(least / 2**20)} to hold one "
            f"sequence of policy.context {policy.context}, got {settings.kv_cache_mib}."
        )
    options: dict[str, Any] = {
        "dtype": str(policy.dtype).removeprefix("torch."),
        "revision": policy.settings.revision,
        "trust_remote_code": policy.settings.trust_remote_code,
        "max_model_len": policy.context,
        "max_num_seqs": settings.rows,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": _served_rank(policy.settings.lora.rank),
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
    }
    if settings.base == "plugin":
        _check_plugin(policy)
        options["quantization"] = "bitsandbytes"
    if policy.device.type == "cpu":
        cache = asked or max(CPU_KV_CACHE, least)
        return options | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": cache,
            "block_size": CPU_BLOCK,
        }
    return options | {
        "enforce_eager": settings.eager,
        "enable_sleep_mode": settings.sleep,
        "gpu_memory_utilization": _share(settings.gpu_memory, policy.device),
        "kv_cache_memory_bytes": asked,
    }


def _share(asked: Literal["auto"] | float, device: torch.device) -> float:
    """The share of the card: what the recipe or the memory plan says, else most of what is free.

    There is no plan for evaluations and for models that it doesn't know.
    """
    if not isinstance(asked, str):
        return asked
    free, card = torch.cuda.mem_get_info(device)
    return 0.8 * free / card


def _check_plugin(policy: Policy) -> None:
    """Whether vLLM can have the base that the trainer has from bitsandbytes' plugin for it."""
    instead = "or rollout.base=nf4_dequantised"
    settings = policy.settings
    if not entry_points(group="vllm.general_plugins", name="bitsandbytes"):
        raise RolloutError(
            "rollout.base: plugin needs the package vllm-bnb-plugin, which is not installed. "
            f"pip install --no-deps vllm-bnb-plugin==0.0.3, {instead}."
        )
    if settings.quantization != "nf4" or not settings.double_quantization:
        raise RolloutError(
            "policy.quantization: must be nf4 with policy.double_quantization for rollout.base "
            f"plugin, which quantises so, got {settings.quantization} with "
            f"{settings.double_quantization}. Set both, {instead}."
        )
    if policy.dtype == torch.float32:
        raise RolloutError(
            "policy.dtype: must be bfloat16 or float16 for rollout.base plugin, got float32. "
            f"Set policy.dtype=bfloat16, {instead}."
        )


def _served_rank(rank: int) -> int:
    """The smallest rank that vLLM can be started with and that holds the policy's."""
    if rank > max(RANKS):
        raise RolloutError(
            f"policy.lora.rank: must be at most {max(RANKS)} with vLLM, got {rank}. "
            "Lower it or set rollout.engine=transformers."
        )
    return min(r for r in RANKS if r >= rank)


def sampling_jobs(
    requests: Sequence[Request], sampling: Sampling, context: int, eos_ids: Sequence[int]
) -> list[Job]:
    """One job per seed, in order. Raises: RolloutError for a prompt without room."""
    common = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": list(sampling.stop),
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,  # The policy's ids count, not those that vLLM finds on disk.
        "skip_special_tokens": False,
        "logprobs": 0,
    }
    rooms = [_room_left(len(request.prompt_ids), context) for request in requests]
    # One prompt per seed: with n > 1 vLLM would count up from the first one.
    return [
        (r.prompt_ids, common | {"max_tokens": min(sampling.max_tokens, room), "seed": _folded(s)})
        for r, room in zip(requests, rooms, strict=True)
        for s in r.seeds
    ]


def scoring_job(prompt_ids: Sequence[int], token_ids: Sequence[int], context: int) -> Job:
    """The job whose prompt is both. Raises: RolloutError if they leave no room for one more."""
    ids = [*prompt_ids, *token_ids]
    _room_left(len(prompt_ids), context)
    _room_left(len(ids), context)
    # vLLM must generate one token, and reads no prefix cache when it scores a prompt.
    return ids, {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}


def _room_left(length: int, context: int) -> int:
    """How many tokens fit after a prompt of that length. Raises: RolloutError for none."""
    if not 1 <= length < context:
        raise RolloutError(
            f"prompt: must have 1 to {context - 1} tokens, got {length}. "
            "Raise policy.context or shorten the prompt."
        )
    return context - length


def _folded(seed: int) -> int:
    """A seed that vLLM takes (63 bits; -1 would mean none) and whose low 32 bits hold it all."""
    # torch's CPU generator reads no more than those; smaller seeds stay what they are.
    seed %= 2**63
    return seed ^ seed >> 32


def adapter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the files that the model's adapter is saved to."""
    adapter = f".{model.active_adapter}"
    return {
        name.replace(adapter, ""): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if ".lora_" in name and f"{adapter}." in f"{name}."
    }


def check_adapter(adapter: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """vLLM would serve the base for unknown names, and NaN or cut tensors as they are."""
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
