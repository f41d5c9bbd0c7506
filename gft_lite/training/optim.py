"""The optimiser over the adapter, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console

from gft_lite.objective.methods import find_method
from gft_lite.planning.learning_rate import automatic_rate, with_rate
from gft_lite.policy.base import Policy
from gft_lite.policy.model_config import model_width
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.training_sections import OptimSettings
from gft_lite.utils.errors import RecipeError


def settle_rate(recipe: Recipe, console: Console) -> Recipe:
    """The recipe with a number for `optim.lr: auto`, which is printed. Raises: RecipeError."""
    if recipe.optim.lr != "auto":
        return recipe
    width = model_width(recipe.policy)
    advantages = find_method(recipe.method).group_advantages
    rate = automatic_rate(recipe, width, group_advantages=advantages)
    half = ", halved for group advantages" if advantages else ""
    console.print(f"optim.lr: {rate:g}, by the rule for a width of {width:,}{half}", soft_wrap=True)
    return with_rate(recipe, rate)


def make_optimizer(policy: Policy, settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW over the adapter; paged 8-bit (arXiv 2305.14314) by default where there is CUDA.

    Raises: RecipeError for a paged optimiser without CUDA.
    """
    paged = settings.is_paged(policy.device.type)
    if paged and policy.device.type != "cuda":
        raise RecipeError(
            ["optim.name: must be auto or adamw without CUDA, got 'paged_adamw_8bit'."]
        )
    arguments: dict[str, Any] = {
        "lr": 0.0,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    groups = _parameter_groups(policy, settings.lora_plus_ratio)
    if paged:
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(groups, **arguments)
    return torch.optim.AdamW(groups, **arguments)


def _parameter_groups(policy: Policy, ratio: float) -> list[dict[str, Any]]:
    """The parameters with the factor of the learning rate of each group: LoRA+'s, or one group.

    As in peft's `create_loraplus_optimizer`: B, and DoRA's norms, have `ratio` times the rate of A.
    """
    named = policy.parameters()
    if ratio == 1:
        return [{"params": list(named.values()), "lr_factor": 1.0}]
    fast = {name for name, p in named.items() if "lora_B" in name or p.ndim == 1}
    groups = [
        {"params": [p for name, p in named.items() if (name in fast) == (factor != 1)],
         "lr_factor": factor}
        for factor in (1.0, ratio)
    ]  # fmt: skip
    return groups


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def learning_rate(progress: float, settings: OptimSettings) -> float:
    """The rate at `progress`, the share of the budget that is spent, in [0, 1].

    A linear warm-up to `lr`, then constant, or a cosine or linear decay to 0.
    """
    if progress < settings.warmup:
        return settings.rate * progress / settings.warmup
    if settings.schedule == "constant":
        return settings.rate
    done = min((progress - settings.warmup) / (1 - settings.warmup), 1.0)
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.rate * left
