"""The config of a base, read without peft and bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from gft_lite.policy.load_errors import LOAD_ERRORS, describe_error
from gft_lite.policy.model_files import check_config
from gft_lite.policy.registry import model_location
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import RecipeError


def model_width(settings: PolicySettings) -> int:
    """The hidden size in the config of the base. Raises: RecipeError."""
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    with report_errors(settings.model):
        config = read_config(model_location(settings.model), settings, options)
    return int(config.get_text_config().hidden_size)


@contextmanager
def report_errors(model: str) -> Iterator[None]:
    """Raise errors of transformers while it reads a base as a RecipeError of policy.model."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except LOAD_ERRORS as error:
        raise RecipeError(
            [f"policy.model: must be a model folder or hub id that loads, got {model!r} "
             f"({describe_error(error)}). Check its name and files."]
        ) from error  # fmt: skip


def read_config(where: str, settings: PolicySettings, options: dict[str, Any]) -> Any:
    """The config of a causal language model. Raises: RecipeError, LOAD_ERRORS."""
    raw, _ = transformers.PreTrainedConfig.get_config_dict(where, revision=settings.revision)
    check_config(raw, settings)
    kind, code = raw["model_type"], raw.get("auto_map") or {}
    if kind not in CONFIG_MAPPING and not ("AutoConfig" in code and settings.trust_remote_code):
        advice = "Choose another model, or a later transformers."
        if "AutoConfig" in code:
            advice = "It brings its own code: set policy.trust_remote_code=true if you trust it."
        raise RecipeError(
            [f"policy.model: must be of a type in transformers {transformers.__version__}, got "
             f"{settings.model!r} of type {kind!r}. {advice}"]
        )  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(where, **options)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in code
    if not causal or getattr(config, "is_encoder_decoder", False):
        raise RecipeError(
            [f"policy.model: must be a causal language model, got {settings.model!r} of type "
             f"{kind!r}. Choose another model."]
        )  # fmt: skip
    return config
