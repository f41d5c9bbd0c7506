"""The gradient of the 1.5B model's adapter by every path, against fp32 with padded rows.

The reference of the NF4 paths computes with NF4's own numbers in plain fp32 matrices, so that
what is left is precision and layout. What NF4 itself changes is told apart: `quantisation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.against_trl import rows
from benchmarks.gpu_check.parts import Figures, Notes
from benchmarks.gpu_check.scale import SMALL, Setup
from benchmarks.gpu_check.work import compared, free, make_groups, random_policy, with_settings
from gft_lite.policy.lora import LoraPolicy
from gft_lite.recipe.schema import Recipe
from gft_lite.training.learner import Learner

GROUPS = 1
PLAIN: dict[str, Any] = {"layout": "padded", "fused_head": False}
NF4_PATHS: dict[str, dict[str, Any]] = {
    "default": {},
    "packed": {"layout": "packed"},
    "padded": {"layout": "padded"},
    "plain": PLAIN,
    "no_layer_recomputed": {"gradient_checkpointing": False},
    "checkpoints_on_cpu": {"offload_checkpoints": True},
}
IN_FP32: dict[str, Any] = {"dtype": "float32", "quantization": "none"} | PLAIN
IN_BF16: dict[str, Any] = {"dtype": "bfloat16", "quantization": "none"}


def check(setup: Setup, notes: Notes) -> None:
    """Note every path's cosine and relative distance to its reference."""
    vectors: dict[str, Tensor] = {}

    def case(name: str, options: dict[str, Any], against: str = "", rounded: bool = False) -> None:
        recipe = setup.recipe(SMALL, policy=options)
        notes.case(name, _path, setup, recipe, vectors, name, against, rounded)
        free()

    case("reference", IN_FP32, rounded=True)
    case("exact", IN_FP32)
    _nf4(setup, notes, vectors)
    free()
    case("nf4 in fp32", {"dtype": "float32"}, "reference")
    case("bf16", IN_BF16, "exact")
    case("quantisation", IN_FP32, "exact", rounded=True)


def _nf4(setup: Setup, notes: Notes, vectors: dict[str, Tensor]) -> None:
    """All paths through one NF4 model."""
    built: list[LoraPolicy] = []

    def path(recipe: Recipe) -> Figures:
        if not built:
            built.append(random_policy(setup, recipe.policy))
        own = with_settings(built[0], recipe.policy)
        return {"layout": own.layout} | compared(vector(setup, recipe, own), vectors["reference"])

    for name, options in NF4_PATHS.items():
        notes.case(f"nf4 {name}", path, setup.recipe(SMALL, policy=options))


def _path(
    setup: Setup, recipe: Recipe, vectors: dict[str, Tensor], name: str, against: str, rounded: bool
) -> Figures:
    """A model's gradient, kept under its name, and how far it is from another."""
    policy = random_policy(setup, recipe.policy, rounded=rounded)
    found = vectors[name] = vector(setup, recipe, policy)
    figures = {"layout": policy.layout, "norm": found.norm().item(), "against": against}
    return figures | (compared(found, vectors[against]) if against else {})


def vector(setup: Setup, recipe: Recipe, policy: LoraPolicy) -> Tensor:
    """The gradient of a group's loss in all of the adapter, [N] on the CPU."""
    groups = make_groups(setup, policy.config.vocab_size)[:GROUPS]
    learner = Learner(policy, recipe)
    learner.micro_batch_tokens = setup.sizes.micro_batch
    learner.gradient(rows(recipe, groups))
    grads = [p.grad for p in policy.parameters().values()]
    found = torch.cat([g.flatten().cpu() for g in grads if g is not None])
    policy.model.zero_grad(set_to_none=True)
    return found
