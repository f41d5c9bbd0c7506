"""The policy's base for a rollout engine, which has none of the trainer's quantisation."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from gft_lite.policy import Policy, model_location


def serving_base(policy: Policy, kind: str, scratch: Path) -> str:
    """The model that an engine should load: a folder or a hub id.

    "nf4_dequantised" writes the very numbers that the trainer computes with, once, to
    `scratch/base`; "original" is the model as published.
    """
    if kind == "original" or policy.settings.quantization == "none":
        return model_location(policy.settings.model)
    folder = scratch / "base"
    if not folder.exists():
        partial = scratch / "base.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_torch_state_dict(_dequantised(policy), partial)
        config = copy.deepcopy(policy.config)
        del config.quantization_config
        config.save_pretrained(partial)
        policy.model.get_base_model().generation_config.save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return str(folder)


def _dequantised(policy: Policy) -> dict[str, Tensor]:
    """The base's weights in the compute dtype, under their original names."""
    base = policy.model.get_base_model()
    modules = dict(base.named_modules())
    state: dict[str, Tensor] = {}
    for name, weight in base.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" not in name:
            plain = _plain(modules[owner], weight) if leaf == "weight" else weight
            name = name.replace(".base_layer", "")
            state[name] = plain.detach().to(policy.dtype).contiguous()
    return state


def _plain(module: nn.Module, weight: Any) -> Tensor:
    """A weight as the module's forward uses it, without quantisation."""
    if isinstance(module, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(module, Linear8bitLt):
        # bitsandbytes moves the scales to the module's state at the first forward.
        scales: Any = weight.SCB if weight.SCB is not None else module.state.SCB
        return int8_vectorwise_dequant(weight.data, scales)
    return weight
