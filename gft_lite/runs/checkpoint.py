"""Checkpoints: adapter, optimiser and counters, as safetensors and JSON only.

Random numbers, learning rate and data position are functions of the seed and the step, so the
step is all that has to be remembered of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gft_lite.policy.base import Policy
from gft_lite.utils.files import fsync, write_text_atomic

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none that is there can be trusted."""


def save(
    folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, keep: int,
    **counters: int,
) -> Path:  # fmt: skip
    """Write `folder/step-N`, complete or not at all, and remove all but the newest `keep`.

    Raises: CheckpointError when the disk takes no more; what was there stays.
    """
    final = folder / f"step-{step:06d}"
    partial = folder / f"{final.name}.tmp"
    try:
        _remove(folder.glob("*.tmp"))
        partial.mkdir(parents=True)
        policy.save_adapter(partial / "adapter")
        tensors, numbers = _flatten(optimizer.state_dict()["state"])
        save_file(tensors, partial / "optimizer.safetensors")
        state = {"step": step, "counters": counters, "optimizer": numbers}
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        _seal(partial)
        _remove([final])
        partial.rename(final)
        fsync(folder)
        fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        _remove([partial])
        older = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
        raise CheckpointError(
            f"checkpoint: could not write {final} ({error}). Older ones are untouched: {older}. "
            "Make room or lower checkpoint.keep, then continue with --resume."
        ) from error
    # By way of another name, since half a folder must not pass for a checkpoint.
    _remove(old.rename(old.with_suffix(".tmp")) for old in list_checkpoints(folder)[:-keep])
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if not p.suffix)


def newest_valid(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was written; None if there never was one.

    Damaged ones after it are told, and renamed to count no more.
    Raises: CheckpointError if all are damaged.
    """
    saved = list_checkpoints(folder)
    damaged: list[tuple[Path, str]] = []
    while saved and (damage := find_damage(saved[-1])):
        damaged.append((saved.pop(), damage))
    told = [f"{checkpoint}: {damage}" for checkpoint, damage in damaged]
    if damaged and not saved:
        raise CheckpointError(
            f"checkpoint: must be as it was written, got {'; '.join(told)}. There is none before "
            f"it. Remove {folder} to start again from the first step."
        )
    for (checkpoint, _), text in zip(damaged, told, strict=True):
        say(f"damaged checkpoint, going back to the one before: {text}")
        checkpoint.rename(checkpoint.with_suffix(".damaged"))
    return saved[-1] if saved else None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, if anything is."""
    try:
        expected = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name, digest in expected.items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def restore(
    checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, int]]:
    """Load a checkpoint into policy and optimiser; returns its step and counters."""
    policy.load_adapter(checkpoint / "adapter")
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    tensors = load_file(checkpoint / "optimizer.safetensors")
    current = optimizer.state_dict()
    current["state"] = _unflatten(tensors, state["optimizer"])
    optimizer.load_state_dict(current)
    return state["step"], state["counters"]


def _seal(folder: Path) -> None:
    """List the checksums of all files in MANIFEST, and have everything on the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in (*files, *(p for p in folder.rglob("*") if p.is_dir())):
        fsync(path)
    digests = {p.relative_to(folder).as_posix(): _sha256(p) for p in files}
    write_text_atomic(folder / MANIFEST, json.dumps({"sha256": digests}, indent=1))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _flatten(state: dict[int, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimiser state as tensors and plain numbers, keyed "parameter/name"."""
    tensors, numbers = {}, {}
    for index, entries in state.items():
        for name, value in entries.items():
            key = f"{index}/{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value.contiguous()
            else:
                numbers[key] = value
    return tensors, numbers


def _unflatten(
    tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    return state
