"""One optimiser step: the schedule, the loss over micro-batches, and what is not a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gft_lite.batching import MicroBatch, Row, cut
from gft_lite.objective import find_method, k3
from gft_lite.policy import Policy
from gft_lite.recipe import OptimSettings, Recipe, RecipeError


def make_optimizer(policy: Policy, settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW over the adapter; paged 8-bit (arXiv 2305.14314) by default where there is CUDA.

    Raises: RecipeError for a paged optimiser without CUDA.
    """
    on_gpu = policy.device.type == "cuda"
    paged = settings.name == "paged_adamw_8bit" or (settings.name == "auto" and on_gpu)
    if paged and not on_gpu:
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


def learning_rate(share: float, settings: OptimSettings) -> float:
    """The rate when `share` of the budget, 0 to 1, is spent: a linear warm-up to `lr`, then
    constant, or cosine or linear down to 0."""
    if share < settings.warmup:
        return settings.lr * share / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    done = min((share - settings.warmup) / (1 - settings.warmup), 1.0)
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.lr * left


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did: sums over its response tokens, so that updates can be added up.

    `skipped` is "flat" when no row had an advantage, "non_finite" when loss or gradient was
    not a number; the weights have not moved then.
    """

    lr: float
    tokens: int = 0
    loss: float = 0.0
    grad_norm: float | None = None
    entropy_sum: float = 0.0
    rectified_sum: float | None = None
    skipped: Literal["flat", "non_finite"] | None = None


@dataclass(frozen=True, slots=True)
class Portion:
    """The rows of one update, cut into micro-batches, with old log-probs where needed."""

    batches: Sequence[MicroBatch]
    old_logprobs: Sequence[Tensor | None]
    learns: bool


def portion(policy: Policy, recipe: Recipe, rows: Sequence[Row]) -> Portion:
    """Prepare an update before the first one of its rollout, while the policy is the old one."""
    method = find_method(recipe.method)
    batches = cut(rows, recipe.train.micro_batch_tokens, pad_id=policy.pad_id)
    old: list[Tensor | None] = [None] * len(batches)
    if "old_logprobs" in method.needs and recipe.train.updates_per_rollout > 1:
        with torch.no_grad():
            old = [policy.token_scores(batch).logprobs for batch in batches]
    learns = bool(batches) and (recipe.objective.kl > 0 or any(row.advantage for row in rows))
    return Portion(batches, old, learns)


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, recipe: Recipe, share: float, part: Portion
) -> Update:
    """One optimiser step over the micro-batches of a portion, with one denominator.

    `share` is how much of the run's budget is spent half way through it.
    """
    lr = learning_rate(share, recipe.optim)
    if not part.learns:
        return Update(lr, skipped="flat")
    optimizer.zero_grad(set_to_none=True)
    sums = [
        _backward(policy, recipe, batch, old)
        for batch, old in zip(part.batches, part.old_logprobs, strict=True)
    ]
    loss, entropy, rectified = (sum(column) for column in zip(*sums, strict=True))
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters().values(), recipe.optim.clip_norm)
    finite = math.isfinite(loss) and bool(norm.isfinite())
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(
        lr=lr,
        tokens=sum(batch.row.numel() for batch in part.batches),
        loss=loss,
        grad_norm=norm.item(),
        entropy_sum=entropy,
        rectified_sum=rectified if "tau" in find_method(recipe.method).parameters else None,
        skipped=None if finite else "non_finite",
    )


def _backward(
    policy: Policy, recipe: Recipe, batch: MicroBatch, old: Tensor | None
) -> tuple[float, float, float]:
    """Add a micro-batch's gradient; returns its share of the loss, entropy and rectified sums."""
    method, settings = find_method(recipe.method), recipe.objective
    batch = batch.to(policy.device)
    scores = policy.token_scores(batch, reference_kl="reference_kl" in method.needs)
    given = {"old_logprobs": old, "reference_kl": scores.reference_kl}
    arguments: dict[str, Any] = {name: getattr(settings, name) for name in method.parameters}
    arguments |= {need: given[need] for need in method.needs}
    per_token = method.loss(scores.logprobs, batch.advantages, **arguments)
    if settings.kl:
        with torch.no_grad(), policy.reference():
            reference = policy.token_scores(batch).logprobs
        per_token = per_token + settings.kl * k3(scores.logprobs, reference)
    loss = (batch.weights * per_token).sum()
    loss.backward()
    rectified = (scores.logprobs.detach().exp() < settings.tau).sum()
    return loss.item(), scores.entropy.sum().item(), rectified.item()


def combined(updates: Sequence[Update]) -> dict[str, Any]:
    """The metrics of the updates of one step."""
    ran = [u for u in updates if u.tokens]
    tokens = sum(u.tokens for u in ran)
    skipped = [u.skipped for u in updates if u.skipped]
    metrics = {
        "updates": len(updates) - len(skipped),
        "skipped": ", ".join(skipped) or None,
        "lr": updates[-1].lr,
        "trained_tokens": tokens,
        "loss": _per(ran, "loss", len(ran)),
        "grad_norm": _per(ran, "grad_norm", len(ran)),
        "entropy": _per(ran, "entropy_sum", tokens),
        "rectified": _per(ran, "rectified_sum", tokens),
    }
    # JSON has no NaN: what was not a number is told by `skipped`.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()}  # fmt: skip


def _per(updates: Sequence[Update], name: str, count: int) -> float | None:
    values = [getattr(u, name) for u in updates]
    return None if not count or None in values else sum(values) / count
