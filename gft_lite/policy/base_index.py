"""The index of the engines' copies of bases: which copy is that of a base, without hashing it.

A copy is named by a hash of the trainer's weights, which takes seconds to tens of seconds. The
index keeps the name under a key that takes a pass over the weights on their own device: the files
of the model and their times, everything that decides how they are loaded, and a sum over the bits
of each tensor. An unknown key, or a copy with other files than were written, is hashed as before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gft_lite.policy.base import Policy
from gft_lite.policy.kept_base import checksum
from gft_lite.policy.model_files import file_identities
from gft_lite.policy.registry import model_location
from gft_lite.utils.files import INVALID, write_text_atomic
from gft_lite.utils.imports import installed_version
from gft_lite.version import __version__

FILE = "bases.json"  # Beside the folder of the copies.
_PACKAGES = ("torch", "transformers", "tokenizers", "bitsandbytes")


def index_key(policy: Policy, dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of what the copy in `dtype` of a policy's base is made from.

    `tensors` are the base's weights and quantisation states by name.
    """
    base: Any = policy.model.get_base_model()
    folder = Path(model_location(policy.settings.model))
    inputs = {
        "dtype": str(dtype),
        "settings": policy.settings.loading_inputs,
        # A revision of the hub is resolved to a commit, whose files never change.
        "files": file_identities(folder) if folder.is_dir() else policy.config._commit_hash,
        "config": policy.config.to_json_string(),
        "generation": base.generation_config.to_json_string(),
        "tokenizer": [repr(policy.tokenizer), policy.tokenizer.chat_template],
        "versions": [__version__, *map(installed_version, _PACKAGES)],
        "weights": [(n, str(t.dtype), tuple(t.shape), checksum(t)) for n, t in tensors],
    }
    return hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()


def find_copy(bases: Path, key: str) -> Path | None:
    """The copy that was written for `key`, None unless it is there as it was written."""
    try:
        entry = _read(bases)[key]
        folder = bases / entry["folder"]
        if folder.parent == bases and _state(folder) == entry["files"]:
            return folder
    except (OSError, *INVALID):
        pass
    return None


def record_copy(bases: Path, key: str, folder: Path) -> None:
    """Keep under `key` the name of a copy and the state of its files."""
    entries = {k: entry for k, entry in _read(bases).items() if _is_there(bases, entry)}
    entries[key] = {"folder": folder.name, "files": _state(folder)}
    write_text_atomic(bases.parent / FILE, json.dumps(entries, indent=1))


def _read(bases: Path) -> dict[str, Any]:
    """The entries by key; none of a file that is missing or damaged."""
    try:
        entries = json.loads((bases.parent / FILE).read_bytes())
    except (OSError, *INVALID):
        return {}
    return entries if isinstance(entries, dict) else {}


def _is_there(bases: Path, entry: Any) -> bool:
    return isinstance(entry, dict) and os.path.isdir(bases / str(entry.get("folder")))


def _state(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file of a copy."""
    states = {file.name: file.stat() for file in folder.iterdir()}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
