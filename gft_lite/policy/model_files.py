"""Checks of a model's files that need neither torch nor transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gft_lite.policy.adapter_config import CONFIG as ADAPTER_CONFIG
from gft_lite.policy.registry import model_location
from gft_lite.recipe.base import is_hub_id
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.hub import why_offline

if TYPE_CHECKING:
    from gft_lite.recipe.sections import PolicySettings

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX = "model.safetensors.index.json"
# Classes of models that do not predict the next token, although some load as if they did.
_NOT_CAUSAL = re.compile(
    "Encoder|For(MaskedLM|PreTraining|NextSentencePrediction|MultipleChoice|QuestionAnswering|"
    r"\w*Classification|\w*Regression|\w*Segmentation|\w*Detection|CTC)"
)


def check_model_files(settings: PolicySettings, *, needs_weights: bool = True) -> None:
    """Check the folder `policy.model`; a hub id is checked when its config has been fetched.

    Without `needs_weights`, a folder with nothing but a config passes. Raises: RecipeError.
    """
    model = settings.model
    folder = Path(model_location(model))
    if not folder.is_dir():
        _check_name(folder, model)
        why_offline()  # Before a library requests its files.
        return
    rule = "policy.model: must be the folder of a base model, or a hub id, got"
    if (folder / ADAPTER_CONFIG).is_file():
        raise RecipeError(
            [f"{rule} {model!r} with an adapter. Set policy.adapter to it, and policy.model to the "
             f"base that its {ADAPTER_CONFIG} names."]
        )  # fmt: skip
    if (folder / "recipe.yaml").is_file():
        raise RecipeError(
            [f"{rule} the run {model!r}. Set policy.adapter={folder / 'adapter'}, and policy.model "
             "as in its recipe.yaml."]
        )  # fmt: skip
    if needs_weights or any(file.name.endswith((*PICKLES, ".gguf")) for file in folder.iterdir()):
        check_safetensors(folder, "*.safetensors", "policy.model")
    if not (folder / "config.json").is_file():
        raise RecipeError([f"{rule} {model!r} without config.json. Download it again."])
    _check_whole(folder, model)
    return check_config(_read_config(folder, model), settings)


def _check_name(path: Path, model: str) -> None:
    """Require that what is no folder is a hub id. Raises: RecipeError."""
    rule = "policy.model: must be the folder of a base model, or a hub id, got"
    if path.suffix == ".gguf":
        raise RecipeError(
            [f"{rule} {model!r}, a GGUF file, which can't be trained. Give the model that it was "
             "converted from."]
        )  # fmt: skip
    if path.is_file():
        raise RecipeError([f"{rule} the file {model!r}. Give the folder that holds it."])
    if not is_hub_id(model):
        raise RecipeError([f"{rule} {model!r}, which does not exist. Check the path."])


def file_identities(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """Name, size, modification, change and inode of each file of a folder, links followed.

    Whatever writes to a file sets its time of change, also where it keeps size and modification.
    """
    found = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in found]


def check_safetensors(folder: Path, pattern: str, field: str) -> None:
    """Require weights as safetensors, since unpickling can run any code. Raises: RecipeError."""
    if any(folder.glob(pattern)):
        return
    files = sorted(f.name for f in folder.iterdir())
    got, advice = "none", "Give the folder with the weights."
    if pickles := [name for name in files if name.endswith(PICKLES)]:
        got = f"{pickles[0]}, a pickle, which can run code when it is read"
        advice = "Convert it where you trust it."
    elif gguf := [name for name in files if name.endswith(".gguf")]:
        got = f"{gguf[0]}, a GGUF file, which can't be trained"
        advice = "Give the model that it was converted from."
    raise RecipeError(
        [f"{field}: must have its weights as safetensors, got {got}, in {str(folder)!r}. {advice}"]
    )


def _check_whole(folder: Path, model: str) -> None:
    """Require the files that the index of the weights names, each with its header.

    A file without one is the pointer that a clone without Git LFS has in place of the weights, or
    an interrupted download. Raises: RecipeError.
    """
    rule = f"policy.model: must have all the weights of its config.json, got {model!r}"
    files = set(folder.glob("*.safetensors"))
    if (folder / _INDEX).is_file():
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            named = {folder / str(name) for name in index["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                [f"{rule}, whose {_INDEX} has no weight_map ({error!r}). Download it again."]
            ) from error
        if missing := sorted(file.name for file in named - files):
            raise RecipeError([f"{rule} without {missing[0]}. Download it again."])
    for file in sorted(files):
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if not 0 < header <= file.stat().st_size - 8:
            raise RecipeError(
                [f"{rule}, whose {file.name} is an interrupted download or the pointer of Git LFS. "
                 "Download it again."]
            )  # fmt: skip


def _read_config(folder: Path, model: str) -> dict[str, Any]:
    rule = "policy.model: must have a config.json that is a JSON object"
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:  # Also of bytes that are not UTF-8.
        raise RecipeError([f"{rule}, got {model!r} ({error}). Download it again."]) from error
    if not isinstance(raw, dict):
        raise RecipeError([f"{rule}, got {model!r}. Download it again."])
    return raw


def check_config(raw: Mapping[str, Any], settings: PolicySettings) -> None:
    """Check the content of a config.json as far as it decides alone. Raises: RecipeError."""
    model, kind = settings.model, raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise RecipeError(
            [f"policy.model: must have its model_type in config.json, got {model!r} without. "
             "Download it again."]
        )  # fmt: skip
    classes = raw.get("architectures") or []
    other = [name for name in classes if isinstance(name, str) and _NOT_CAUSAL.search(name)]
    if other or raw.get("is_encoder_decoder"):
        of = f"class {other[0]}" if other else f"type {kind!r}, with an encoder"
        raise RecipeError(
            [f"policy.model: must be a causal language model, got {model!r} of {of}. Choose "
             "another model."]
        )  # fmt: skip
    _check_quantization(raw.get("quantization_config"), settings)


def _check_quantization(stored: Any, settings: PolicySettings) -> None:
    """Require that a stored quantisation is the recipe's. Raises: RecipeError."""
    if not isinstance(stored, Mapping):
        return
    kind = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type")
    if kind not in ("nf4", "int8"):
        raise RecipeError(
            [f"policy.model: must be stored unquantised or by bitsandbytes as nf4 or int8, got "
             f"{settings.model!r} in {kind or stored.get('quant_method')}. Give the original "
             "model; policy.quantization quantises it."]
        )  # fmt: skip
    if kind != settings.quantization:
        raise RecipeError(
            [f"policy.quantization: must be {kind}, in which {settings.model!r} is stored, got "
             f"{settings.quantization}. Set policy.quantization={kind}."]
        )  # fmt: skip
