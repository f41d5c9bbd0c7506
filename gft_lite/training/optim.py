"""The optimiser over the adapter, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from gft_lite.policy.base import Policy
from gft_lite.recipe.training_sections import OptimSettings
from gft_lite.utils.errors import RecipeError


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
    parameters = list(policy.parameters().values())
    if paged:
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(parameters, **arguments)
    return torch.optim.AdamW(parameters, **arguments)


def learning_rate(progress: float, settings: OptimSettings) -> float:
    """The rate at `progress`, the share of the budget that is spent, in [0, 1].

    A linear warm-up to `lr`, then constant, or a cosine or linear decay to 0.
    """
    if progress < settings.warmup:
        return settings.lr * progress / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    done = min((progress - settings.warmup) / (1 - settings.warmup), 1.0)
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.lr * left
