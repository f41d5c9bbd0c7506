"""The files that an audit's processes exchange: JSON and safetensors, nothing that runs code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Row
from gft_lite.recipe.schema import Recipe

_STEP, _TENSORS, _GRADIENT = "step.json", "step.safetensors", "gradient.safetensors"
_WEIGHT, _INPUT = "weight/", "input/"  # Prefixes of the tensors' names.


def write_step(folder: Path, recipe: Recipe, rows: Sequence[Row], policy: Policy) -> None:
    """Write recipe, rows and adapter of a step."""
    tensors = {_WEIGHT + name: p.detach().contiguous() for name, p in policy.parameters().items()}
    written = []
    for i, row in enumerate(rows):
        for name, value in row.loss_inputs.items():
            tensors[f"{_INPUT}{i}/{name}"] = torch.as_tensor(value, dtype=torch.float64)
        written.append(asdict(row) | {"loss_inputs": list(row.loss_inputs)})
    save_file(tensors, folder / _TENSORS)
    step = {"recipe": recipe.model_dump(mode="json"), "rows": written}
    (folder / _STEP).write_text(json.dumps(step), encoding="utf-8")


def read_step(folder: Path) -> tuple[Recipe, list[Row], Mapping[str, Tensor]]:
    """Recipe, rows and adapter, as `write_step` was given them."""
    step = json.loads((folder / _STEP).read_text(encoding="utf-8"))
    tensors = load_file(folder / _TENSORS)
    rows = []
    for i, fields in enumerate(step["rows"]):
        inputs = {name: tensors[f"{_INPUT}{i}/{name}"] for name in fields["loss_inputs"]}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        rows.append(Row(**{**values, "loss_inputs": inputs}))
    weights = {
        name.removeprefix(_WEIGHT): tensor
        for name, tensor in tensors.items()
        if name.startswith(_WEIGHT)
    }
    return Recipe.from_tree(step["recipe"]), rows, weights


def write_gradient(folder: Path, gradient: Tensor) -> None:
    """Write the gradient of the step."""
    save_file({"gradient": gradient.contiguous()}, folder / _GRADIENT)


def read_gradient(folder: Path) -> Tensor:
    """The gradient, as `write_gradient` was given it."""
    return load_file(folder / _GRADIENT)["gradient"]
