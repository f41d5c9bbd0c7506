"""Checks of the weights of models and adapters: every tensor present and in size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitsandbytes.nn import Linear4bit
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gft_lite.policy.adapter_config import WEIGHTS
from gft_lite.policy.load_errors import describe_error
from gft_lite.utils.errors import RecipeError


def check_missing_weights(base: Any, report: dict[str, Any], model: str) -> None:
    """Require every weight of the model in its size. Raises: RecipeError.

    transformers initialises missing weights at random and accepts 4-bit weights of any size.
    `report` is the loading info of `from_pretrained`.
    """
    wrong_size = [
        name
        for name, module in base.named_modules()
        if isinstance(module, Linear4bit) and not _has_right_size(module, module.weight)
    ]
    for what, names in (("lack", report["missing_keys"]), ("have another size of", wrong_size)):
        if names:
            raise RecipeError(
                [f"policy.model: must have all the weights of its config.json, got {model!r}, "
                 f"whose files {what} {len(names)}, such as {min(names)}. Download it again."]
            )  # fmt: skip


def _has_right_size(module: Linear4bit, weight: Any) -> bool:
    """True if the quantised weight has the shape that the layer declares."""
    state = getattr(weight, "quant_state", None)
    return state is not None and tuple(state.shape) == (module.out_features, module.in_features)


def read_fitting_weights(model: Any, name: str, folder: Path, field: str) -> dict[str, Tensor]:
    """The weights in an adapter's folder, which must match the model's adapter `name`.

    peft itself ignores unknown tensors and keeps the old values of missing ones.
    Raises: RecipeError.
    """
    rule = f"{field}: must have the weights of a LoRA adapter of this model and configuration"
    try:
        found = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise RecipeError([f"{rule}, got {folder} ({describe_error(error)})."]) from error
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    sizes = [{name: t.shape for name, t in state.items()} for state in (own, found)]
    wrong = sorted({name for name, _ in sizes[0].items() ^ sizes[1].items()})
    if wrong:
        got = f"{len(wrong)} that are missing, foreign or of another size, such as {wrong[0]}"
        raise RecipeError([f"{rule}, got {folder} with {got}."])
    if bad := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise RecipeError([f"{rule}, got {folder}, where {bad[0]} is not finite."])
    return found
