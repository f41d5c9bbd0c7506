"""Checkpoints: adapter, optimiser and counters, as safetensors and JSON only.

Random numbers, learning rate and data position are functions of the seed and the step, so the
step is all that has to be remembered of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gft_lite.policy import Policy


def save(
    folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, keep: int,
    **counters: int,
) -> Path:  # fmt: skip
    """Write `folder/step-N`, complete or not at all, and remove all but the newest `keep`."""
    final = folder / f"step-{step:06d}"
    partial = folder / f"{final.name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.save_adapter(partial / "adapter")
    tensors, numbers = _flatten(optimizer.state_dict()["state"])
    save_file(tensors, partial / "optimizer.safetensors")
    state = {"step": step, "counters": counters, "optimizer": numbers}
    (partial / "state.json").write_text(json.dumps(state))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in all_of(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def all_of(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".tmp")


def restore(
    checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, int]]:
    """Load a checkpoint into policy and optimiser; returns its step and counters."""
    policy.load_adapter(checkpoint / "adapter")
    state = json.loads((checkpoint / "state.json").read_text())
    tensors = load_file(checkpoint / "optimizer.safetensors")
    current = optimizer.state_dict()
    current["state"] = _unflatten(tensors, state["optimizer"])
    optimizer.load_state_dict(current)
    return state["step"], state["counters"]


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
