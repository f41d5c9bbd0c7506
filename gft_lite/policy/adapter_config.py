"""The adapter_config.json of a LoRA adapter, read without torch or peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gft_lite.recipe.lora_section import LoraSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of a LoRA adapter. Raises: ValueError with the reason."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"a readable {CONFIG}, got {str(folder)!r} ({error})") from error
    if not isinstance(config, dict) or type(config.get("r")) is not int:
        raise ValueError(f"the rank r of a LoRA in {CONFIG}, got {str(folder)!r}")
    return config


def lora_settings(config: dict[str, Any]) -> LoraSettings:
    """An adapter's configuration as the recipe section `policy.lora`.

    The values are not validated: peft also supports an alpha that is no whole number and target
    modules as a regular expression. What peft excludes is not known to the recipe.
    """
    return LoraSettings.model_construct(
        rank=config["r"],
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        target_modules=config.get("target_modules"),
        use_rslora=config.get("use_rslora", False),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        use_dora=config.get("use_dora", False),
    )
