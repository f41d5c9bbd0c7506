"""Checks of the weights of models and adapters: no pickles, every tensor present and in size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitsandbytes.nn import Linear4bit
from huggingface_hub import snapshot_download
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gft_lite.recipe.base import HUB_ID
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import RecipeError

WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_no_pickle(folder: Path, weights: str, field: str) -> None:
    """Require weights as safetensors, since unpickling can run any code. Raises: RecipeError."""
    if folder.is_dir() and not any(folder.glob(weights)):
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        got = f"{pickles[0]}, a pickle, which can run code when it is read" if pickles else "none"
        raise RecipeError(
            [f"{field}: must have its weights as safetensors, got {got}, in {str(folder)!r}. "
             "Convert it where you trust it."]
        )  # fmt: skip


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
                 f"whose files {what} {len(names)}, such as {min(names)}."]
            )  # fmt: skip


def _has_right_size(module: Linear4bit, weight: Any) -> bool:
    """True if the quantised weight has the shape that the layer declares."""
    state = getattr(weight, "quant_state", None)
    return state is not None and tuple(state.shape) == (module.out_features, module.in_features)


def check_plain_head(config: Any) -> None:
    """Require logits that are the output of the head; `OutputHead` does not rescale them.

    Raises: RecipeError.
    """
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise RecipeError(
                [f"policy.model: must have a plain output head, got {config.model_type} "
                 f"with {name}"]
            )  # fmt: skip


def adapter_folder(adapter: str) -> Path:
    """The folder of a PEFT adapter, downloaded if `adapter` is a hub id. Raises: RecipeError."""
    found = Path(adapter)
    if not found.is_dir():
        found = Path(snapshot_download(adapter, allow_patterns=["adapter_config.json", WEIGHTS]))
    check_no_pickle(found, WEIGHTS, "policy.adapter")
    return found


def check_adapter_base(config: Any, adapter: str, settings: PolicySettings) -> None:
    """Require that an adapter's config names the recipe's model, if both are hub ids.

    The weights of an adapter of another base of the same shape would load. Raises: RecipeError.
    """
    named = str(getattr(config, "base_model_name_or_path", None))
    on_hub = HUB_ID.fullmatch(named) and not Path(named).exists()
    if on_hub and named != settings.model and not Path(settings.model).exists():
        raise RecipeError(
            [f"policy.adapter: must be an adapter of {settings.model}, got {adapter!r} of {named}. "
             "Set policy.model, or base_model_name_or_path in its adapter_config.json."]
        )  # fmt: skip


def read_fitting_weights(model: Any, name: str, folder: Path, field: str) -> dict[str, Tensor]:
    """The weights in an adapter's folder, which must match the model's adapter `name`.

    peft itself ignores unknown tensors and keeps the old values of missing ones.
    Raises: RecipeError.
    """
    rule = f"{field}: must have the weights of a LoRA adapter of this model and configuration"
    try:
        found = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise RecipeError([f"{rule}, got {folder} ({error})."]) from error
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    sizes = [{name: t.shape for name, t in state.items()} for state in (own, found)]
    wrong = sorted({name for name, _ in sizes[0].items() ^ sizes[1].items()})
    if wrong:
        got = f"{len(wrong)} that are missing, foreign or of another size, such as {wrong[0]}"
        raise RecipeError([f"{rule}, got {folder} with {got}."])
    if bad := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise RecipeError([f"{rule}, got {folder}, where {bad[0]} is not finite."])
    return found
