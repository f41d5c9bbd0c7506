"""Checkpoints: adapter, optimiser state and counters, as safetensors and JSON only.

Random numbers, learning rate and data position are functions of the seed and the step and are not
saved.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from gft_lite.policy.base import Policy
from gft_lite.utils.files import INVALID, fsync, write_text_atomic

if TYPE_CHECKING:  # Commands look for checkpoints before they import torch.
    import torch

MANIFEST = "manifest.json"
TEACHER = "teacher.safetensors"
_FILES = ("adapter/adapter_model.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"step-\d+")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or all that exist are damaged."""


def save(
    folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, keep: int,
    teacher: Mapping[str, torch.Tensor] | None = None, protected: Collection[int] = (),
    **counters: int,
) -> Path:  # fmt: skip
    """Write `folder/step-N` atomically and remove all but the newest `keep` checkpoints.

    `teacher` are the weights of a teacher that follows the policy, if there is one. Those of the
    steps in `protected` are kept as well.
    Raises: CheckpointError if writing fails; older checkpoints stay as they were.
    """
    from safetensors.torch import save_file

    final = _path(folder, step)
    partial = folder / f"{final.name}.tmp"
    try:
        _remove(folder.glob("*.tmp"))
        partial.mkdir(parents=True)
        policy.save_adapter(partial / "adapter")
        tensors, numbers = _flatten(optimizer.state_dict()["state"])
        save_file(tensors, partial / "optimizer.safetensors")
        if teacher:
            save_file(dict(teacher), partial / TEACHER)
        state = {"step": step, "counters": counters, "optimizer": numbers}
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        _write_manifest(partial)
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
    # Renamed first: a folder that is removed in part must not count as a checkpoint.
    old = [c for c in list_checkpoints(folder)[:-keep] if step_of(c) not in protected]
    _remove(checkpoint.rename(checkpoint.with_suffix(".tmp")) for checkpoint in old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = (p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir())
    return sorted(found, key=step_of)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def of_step(folder: Path, step: int) -> Path:
    """The undamaged checkpoint of a step. Raises: CheckpointError if it is missing or damaged."""
    saved = _path(folder, step)
    if damage := find_damage(saved):
        raise CheckpointError(
            f"checkpoint: must be as it was written, got {saved}: {damage}. Restore it from a copy."
        )
    return saved


def newest_valid(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint, None if none was ever written.

    Newer, damaged ones are reported and renamed to `step-N.damaged`.
    Raises: CheckpointError if all are damaged.
    """
    saved = list_checkpoints(folder)
    damaged: list[tuple[Path, str]] = []
    while saved and (damage := find_damage(saved[-1])):
        damaged.append((saved.pop(), damage))
    texts = [f"{checkpoint}: {damage}" for checkpoint, damage in damaged]
    if damaged and not saved:
        raise CheckpointError(
            f"checkpoint: must be as it was written, got {'; '.join(texts)}. There is none before "
            f"it. Remove {folder} to start again from the first step."
        )
    for (checkpoint, _), text in zip(damaged, texts, strict=True):
        report(f"damaged checkpoint, going back to the one before: {text}")
        renamed = checkpoint.with_suffix(".damaged")
        _remove([renamed])  # Of an earlier time at the same step.
        checkpoint.rename(renamed)
    return saved[-1] if saved else None


def find_damage(checkpoint: Path) -> str | None:
    """The first damage found in a checkpoint's files, None if there is none."""
    try:
        expected = json.loads((checkpoint / MANIFEST).read_bytes())["sha256"]
        if missing := [name for name in _FILES if name not in expected]:
            return f"{MANIFEST} does not list {missing[0]}"
        for name, digest in expected.items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} has changed since it was written"
    except (OSError, *INVALID) as error:
        return f"{type(error).__name__}: {error}"
    return None


def restore(
    checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, int]]:
    """Load a checkpoint into policy and optimiser and return its step and counters."""
    from safetensors.torch import load_file

    policy.load_adapter(checkpoint / "adapter")
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    tensors = load_file(checkpoint / "optimizer.safetensors")
    current = optimizer.state_dict()
    current["state"] = _unflatten(tensors, state["optimizer"])
    optimizer.load_state_dict(current)
    return state["step"], state["counters"]


def _write_manifest(folder: Path) -> None:
    """Write the checksums of all files to MANIFEST and sync everything to the disk."""
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
    """Split optimiser state into tensors and numbers, keyed "parameter/name"."""
    tensors, numbers = {}, {}
    for index, entries in state.items():
        for name, value in entries.items():
            key = f"{index}/{name}"
            if hasattr(value, "contiguous"):  # A tensor.
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
