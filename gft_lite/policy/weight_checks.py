"""Models and adapters as they must be on the disk: no pickle, nothing missing, nothing foreign."""

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


def refuse_pickle(folder: Path, weights: str, field: str) -> None:
    """Pickled weights can run any code when they are read."""
    if folder.is_dir() and not any(folder.glob(weights)):
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        got = f"{pickles[0]}, a pickle, which can run code when it is read" if pickles else "none"
        raise RecipeError(
            [f"{field}: must have its weights as safetensors, got {got}, in {str(folder)!r}. "
             "Convert it where you trust it."]
        )  # fmt: skip


def check_missing_weights(base: Any, report: dict[str, Any], model: str) -> None:
    """transformers fills weights that are missing with random numbers, and takes 4-bit ones of
    any size."""
    sized = [
        name
        for name, module in base.named_modules()
        if isinstance(module, Linear4bit) and not _has_its_size(module, module.weight)
    ]
    for what, names in (("lack", report["missing_keys"]), ("have another size of", sized)):
        if names:
            raise RecipeError(
                [f"policy.model: must have all the weights of its config.json, got {model!r}, "
                 f"whose files {what} {len(names)}, such as {min(names)}."]
            )  # fmt: skip


def _has_its_size(module: Linear4bit, weight: Any) -> bool:
    state = getattr(weight, "quant_state", None)
    return state is not None and tuple(state.shape) == (module.out_features, module.in_features)


def refuse_unknown_heads(config: Any) -> None:
    """Some architectures rescale their logits after the head, which the chunks would miss."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise RecipeError(
                [f"policy.model: must have a plain output head, got {config.model_type} "
                 f"with {name}"]
            )  # fmt: skip


def adapter_folder(adapter: str) -> Path:
    """Where the files of a PEFT adapter are, a folder or a hub id, without pickles among them."""
    found = Path(adapter)
    if not found.is_dir():
        found = Path(snapshot_download(adapter, allow_patterns=["adapter_config.json", WEIGHTS]))
    refuse_pickle(found, WEIGHTS, "policy.adapter")
    return found


def refuse_other_base(config: Any, adapter: str, settings: PolicySettings) -> None:
    """An adapter, by its configuration, of another base of the same shape would load. A folder
    may be any base."""
    named = str(getattr(config, "base_model_name_or_path", None))
    on_hub = HUB_ID.fullmatch(named) and not Path(named).exists()
    if on_hub and named != settings.model and not Path(settings.model).exists():
        raise RecipeError(
            [f"policy.adapter: must be an adapter of {settings.model}, got {adapter!r} of {named}. "
             "Set policy.model, or base_model_name_or_path in its adapter_config.json."]
        )  # fmt: skip


def fitting_weights(model: Any, name: str, folder: Path, field: str) -> dict[str, Tensor]:
    """The weights in an adapter's folder, which must be those of the model's adapter.

    peft itself leaves out what it does not know, and what is missing as it was.
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
