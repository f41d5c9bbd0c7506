"""The policy's base as a rollout engine loads it: a dequantised copy in the user's cache.

The copy is written once, under a hash of the trainer's weights; `base_index` finds it again.
"""

from __future__ import annotations

import copy
import fcntl
import filecmp
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gft_lite.policy.base import Policy, ServedBase
from gft_lite.policy.base_index import find_copy, index_key, record_copy
from gft_lite.policy.registry import model_location
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.paths import cache_folder
from gft_lite.utils.progress import track

KEPT = 3  # Copies in the cache; that of an 8B model has 16 GB.
SHARD = 1 << 30  # Bytes of dequantised weights in RAM at a time.

# A parameter and the module that may hold its quantisation state.
Weight = tuple[nn.Module | None, Any]


def serving_base(policy: Policy, kind: str, dtype: torch.dtype | None = None) -> ServedBase:
    """The model that an engine loads, which computes in `dtype`, by default the policy's.

    `nf4_dequantised` has the weights that the trainer computes with, rounded to `dtype`;
    `original` and `plugin` are the published model, which vLLM's plugin quantises as the trainer
    did.
    Raises: RecipeError if the cache can't be written.
    """
    if kind != "nf4_dequantised" or policy.settings.quantization == "none":
        about = "original" if policy.settings.quantization == "none" else kind
        return ServedBase(model_location(policy.settings.model), about)
    bases = cache_folder() / "bases"
    try:
        bases.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One process writes the copy; the others wait for the lock and reuse the copy.
        with _locked(bases, fcntl.LOCK_EX):
            folder, how = _find_or_write(policy, bases, dtype or policy.dtype)
            removed = _remove_old(bases, folder)
            _hold(policy, folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk.
        raise RecipeError(
            [f"GFT_LITE_CACHE: must be a folder with room for the engine's copy of the base, got "
             f"{str(bases.parent)!r} ({error}). Make room, or set it to a folder elsewhere."]
        ) from error  # fmt: skip
    note = f"; {', '.join(removed)} removed, {KEPT} are kept" if removed else ""
    return ServedBase(str(folder), f"nf4_dequantised ({folder}, {how}{note})")


# --- the cache ---------------------------------------------------------------------------------


def _find_or_write(policy: Policy, bases: Path, dtype: torch.dtype) -> tuple[Path, str]:
    """The folder of the policy's copy, and whether it was "reused" or written now."""
    started = time.perf_counter()
    weights = _weights(policy)
    partial = bases / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    key = index_key(policy, dtype, _tensors(weights))
    if known := find_copy(bases, key):
        return known, "reused"
    partial.mkdir()
    _write_descriptions(policy, dtype, partial)
    folder = bases / _digest(weights, dtype, partial)
    if _is_complete(folder, weights, partial):
        shutil.rmtree(partial)
        record_copy(bases, key, folder)
        return folder, "reused"
    _write_weights(weights, dtype, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    record_copy(bases, key, folder)
    return folder, f"written in {time.perf_counter() - started:.1f} s"


def _digest(weights: Mapping[str, Weight], dtype: torch.dtype, descriptions: Path) -> str:
    """A hash of the trainer's weights and of the files in `descriptions`.

    It covers the model's files, the quantisation and the version of bitsandbytes, since each of
    them changes the weights.
    """
    digest = hashlib.sha256(str(dtype).encode())
    for file in sorted(descriptions.iterdir()):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    for name, tensor in _tensors(weights):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _tensors(weights: Mapping[str, Weight]) -> Iterator[tuple[str, Tensor]]:
    """Every weight, each followed by its quantisation state."""
    for name, weight in weights.items():
        for tensor in (weight[1].data, *_scales(*weight).values()):
            yield name, tensor


def _is_complete(folder: Path, weights: Mapping[str, Weight], descriptions: Path) -> bool:
    """True if a copy has every file and every tensor, and no file is truncated."""
    found = {}
    try:
        same = all(filecmp.cmp(f, folder / f.name, False) for f in descriptions.iterdir())
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:  # Raises for a truncated file.
                for name in opened.keys():  # noqa: SIM118
                    found[name] = tuple(opened.get_slice(name).get_shape())
    except (OSError, SafetensorError):
        return False
    return same and found == {name: _shape(*weight) for name, weight in weights.items()}


def _remove_old(bases: Path, new: Path) -> list[str]:
    """Remove all but the most recently used copies, except those that a process holds."""
    others = [folder for folder in bases.iterdir() if folder != new]
    others.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    removed = []
    for old in others[KEPT - 1 :]:
        try:
            with _locked(old, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(old)
                removed.append(old.name)
        except BlockingIOError:
            continue
    return removed


def _hold(policy: Policy, folder: Path) -> None:
    """Lock the folder against removal for the lifetime of the policy."""
    os.utime(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    weakref.finalize(policy, os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_SH)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """An flock of kind `how` on a folder, for the length of a `with`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


# --- the weights -------------------------------------------------------------------------------


def _write_descriptions(policy: Policy, dtype: torch.dtype, folder: Path) -> None:
    """Write the configuration, with this dtype and without quantisation, and the tokenizer."""
    config = copy.deepcopy(policy.config)
    config.dtype = dtype
    del config.quantization_config
    config.save_pretrained(folder)
    savable(policy.model.get_base_model().generation_config).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def savable(generation: Any) -> Any:
    """A copy of a GenerationConfig that passes the validation of `save_pretrained`.

    Some models are published with a temperature and without `do_sample`.
    """
    generation = copy.deepcopy(generation)
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
    return generation


def _weights(policy: Policy) -> dict[str, Weight]:
    """The base's parameters by their original names."""
    base = policy.model.get_base_model()
    modules = dict(base.named_modules())
    found: dict[str, Weight] = {}
    for name, weight in base.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" not in name:
            module = modules[owner] if leaf == "weight" else None
            found[name.replace(".base_layer", "")] = module, weight
    return found


def _write_weights(weights: Mapping[str, Weight], dtype: torch.dtype, folder: Path) -> None:
    """Write the dequantised weights, one shard in RAM at a time."""
    sizes = {n: torch.empty(_shape(*w), dtype=dtype, device="meta") for n, w in weights.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        shard = {
            name: _plain(*weights[name]).to("cpu", dtype).contiguous()
            for name in track(names, "weights")
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def plain_weight(module: nn.Module) -> Tensor:
    """The weight of a linear as its forward pass uses it, dequantised. [out, in]."""
    return _plain(module, module.weight)


def _plain(module: nn.Module | None, weight: Any) -> Tensor:
    """A weight as the module's forward pass uses it, dequantised."""
    if isinstance(module, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(module, Linear8bitLt):
        return int8_vectorwise_dequant(weight.data, _scales(module, weight)["scales"])
    return weight.detach()


def _scales(module: nn.Module | None, weight: Any) -> dict[str, Tensor]:
    """The quantisation state of a weight: scales and codebooks beside its codes."""
    if isinstance(module, Linear4bit):
        return weight.quant_state.as_dict(packed=True)
    if isinstance(module, Linear8bitLt):
        # bitsandbytes moves the scales to the module's state in the first forward pass.
        scales: Any = weight.SCB if weight.SCB is not None else module.state.SCB
        return {"scales": scales}
    return {}


def _shape(module: nn.Module | None, weight: Any) -> tuple[int, ...]:
    """The shape of the dequantised weight."""
    return tuple(weight.quant_state.shape if isinstance(module, Linear4bit) else weight.shape)
