"""One optimiser step: the schedule, the loss over micro-batches, and what is not a number."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from gft_lite.objective.losses import k3
from gft_lite.objective.methods import find_method
from gft_lite.policy.base import Policy, TokenScores
from gft_lite.policy.batching import MicroBatch, Row
from gft_lite.recipe.schema import Recipe
from gft_lite.training.optim import learning_rate
from gft_lite.training.session import Session
from gft_lite.types import Group
from gft_lite.utils.distributed import SINGLE_PROCESS, Distributed


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did: sums over its response tokens, so that updates can be added up.

    `skipped` is "flat" when no row had an advantage, "non_finite" when loss or gradient was
    not a number; the weights have not moved then. `forwarded` counts the tokens that went
    through the model, prompts and padding included; `token_budget` is that of its
    micro-batches, in the end.
    """

    lr: float
    token_budget: int
    tokens: int = 0
    forwarded: int = 0
    loss: float = 0.0
    grad_norm: float | None = None
    entropy_sum: float = 0.0
    rectified_sum: float | None = None
    skipped: Literal["flat", "non_finite"] | None = None


def portion(
    policy: Policy,
    recipe: Recipe,
    rows: Sequence[Row],
    token_budget: int,
    distributed: Distributed = SINGLE_PROCESS,
) -> list[Row]:
    """The rows that an update has to train on, prepared while the policy is the old one.

    Rows that add nothing to loss and gradient are left out; what they weigh in the reduction
    is in the other rows' weights already. Old log-probs are taken where the loss needs them.
    """
    method, objective = find_method(recipe.method), recipe.objective
    if recipe.train.drop_zero_advantage and method.scales_with_advantage and not objective.kl:
        rows = [row for row in rows if row.advantage]
    rows = [row for row in rows if row.response_ids]
    if "old_logprobs" in method.needs and recipe.train.updates_per_rollout > 1:
        rows = _with_old_logprobs(policy, rows, token_budget, distributed)
    return rows


@torch.no_grad()
def _with_old_logprobs(
    policy: Policy, rows: Sequence[Row], token_budget: int, distributed: Distributed
) -> list[Row]:
    old: dict[int, Tensor] = {}
    for batch in distributed.shard(policy.batches(rows, token_budget)):
        logprobs = policy.token_scores(batch).logprobs.cpu()
        for i in batch.row.unique().tolist():
            old[i] = logprobs[batch.row == i]
    everyones = {i: found for part in distributed.all_gather([old]) for i, found in part.items()}
    return [replace(row, old_logprobs=everyones[i]) for i, row in enumerate(rows)]


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, recipe: Recipe, share: float,
    rows: Sequence[Row], token_budget: int, distributed: Distributed = SINGLE_PROCESS,
) -> Update:  # fmt: skip
    """One optimiser step over rows in micro-batches, with one denominator.

    `share` is how much of the run's budget is spent half way through it.
    """
    lr = learning_rate(share, recipe.optim)
    if not (recipe.objective.kl or any(row.advantage for row in rows)) or not rows:
        return Update(lr, token_budget, skipped="flat")
    done = gradient(policy, recipe, rows, token_budget, distributed)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters().values(), recipe.optim.clip_norm)
    finite = math.isfinite(done.loss) and bool(norm.isfinite())
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    policy.model.zero_grad(set_to_none=True)
    skipped: Literal["non_finite"] | None = None if finite else "non_finite"
    return replace(done, lr=lr, grad_norm=norm.item(), skipped=skipped)


def gradient(
    policy: Policy,
    recipe: Recipe,
    rows: Sequence[Row],
    token_budget: int,
    distributed: Distributed = SINGLE_PROCESS,
) -> Update:
    """The gradient of all rows, in micro-batches half as large when memory runs out.

    Processes that train together take turns in the micro-batches, and all get the whole gradient.
    Raises: MemoryError when not even the longest row fits by itself.
    """
    while True:
        policy.model.zero_grad(set_to_none=True)
        batches = _batches(policy, rows, token_budget, distributed.world_size)
        sums = _sums(policy, recipe, distributed.shard(batches))
        if not distributed.any(sums is None):
            break
        gc.collect()
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batches) == len(rows):
            raise MemoryError(
                f"train.micro_batch_tokens: out of memory with one row of "
                f"{max(map(len, rows))} tokens. Lower rollout.max_tokens, or see gft-lite plan."
            )
        # No smaller than what was cut already: a budget may be far above what there is to cut.
        token_budget = min(token_budget, max(b.input_ids.numel() for b in batches)) // 2
    loss, entropy, rectified = _added_up(policy, sums or [], distributed)
    return Update(
        lr=0.0,
        token_budget=token_budget,
        tokens=sum(batch.targets.numel() for batch in batches),
        forwarded=sum(batch.input_ids.numel() for batch in batches),
        loss=loss,
        entropy_sum=entropy,
        rectified_sum=rectified if "tau" in find_method(recipe.method).parameters else None,
    )


def _batches(
    policy: Policy, rows: Sequence[Row], token_budget: int, least: int
) -> list[MicroBatch]:
    """Micro-batches under the budget, smaller ones if that makes too few to go round."""
    while True:
        batches = policy.batches(rows, token_budget)
        if len(batches) >= min(least, len(rows)):
            return batches
        token_budget = max(batch.input_ids.numel() for batch in batches) // 2


def _added_up(
    policy: Policy, sums: Sequence[tuple[float, float, float]], distributed: Distributed
) -> list[float]:
    """The sums of all micro-batches, with the gradients of all in place of this process's own."""
    totals = torch.tensor(sums or [(0.0, 0.0, 0.0)], dtype=torch.float64).sum(0)
    if distributed.world_size > 1:
        totals = totals.to(policy.device)
        distributed.all_reduce_sum_([totals])
        for parameter in policy.parameters().values():
            if parameter.grad is None:  # This process had no micro-batch.
                parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce_sum_(
            [p.grad for p in policy.parameters().values() if p.grad is not None]
        )
    return totals.tolist()


def _sums(
    policy: Policy, recipe: Recipe, batches: Sequence[MicroBatch]
) -> list[tuple[float, float, float]] | None:
    """Loss, entropy and rectified tokens of each micro-batch; None when memory ran out."""
    try:
        return [_backward(policy, recipe, batch) for batch in batches]
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return None  # Out of the except: it holds on to what the step had allocated.
        raise


def _backward(policy: Policy, recipe: Recipe, batch: MicroBatch) -> tuple[float, float, float]:
    """Add a micro-batch's gradient; returns its share of the loss, entropy and rectified sums."""
    method, settings = find_method(recipe.method), recipe.objective
    batch = batch.to(policy.device)
    arguments: dict[str, Any] = {name: getattr(settings, name) for name in method.parameters}
    reference = None
    if settings.kl:
        with torch.no_grad(), policy.reference():
            reference = policy.token_scores(batch).logprobs

    def loss(scores: TokenScores, span: slice) -> Tensor:
        old = batch.old_logprobs
        given = {
            "old_logprobs": None if old is None else old[span],
            "reference_kl": scores.reference_kl,
        }
        needed = {need: given[need] for need in method.needs}
        per_token = method.loss(scores.logprobs, batch.advantages[span], **arguments, **needed)
        if reference is not None:
            per_token = per_token + settings.kl * k3(scores.logprobs, reference[span])
        return (batch.weights[span] * per_token).sum()

    value, scores = policy.backward(batch, loss, reference_kl="reference_kl" in method.needs)
    rectified = (scores.logprobs.detach().exp() < settings.tau).sum()
    return value, scores.entropy.sum().item(), rectified.item()


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
        "forwarded_tokens": sum(u.forwarded for u in ran),
        "micro_batch_tokens": updates[-1].token_budget,
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


def _update(
    session: Session, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """The optimiser steps on one rollout."""
    policy, recipe = session.policy, session.recipe
    count = recipe.train.updates_per_rollout
    parts = _split(list(zip(groups, advantages, strict=True)), count)
    portions = [
        portion(policy, recipe, _rows(session, part), session.token_budget, session.distributed)
        for part in parts
    ]
    tokens = sum(len(response.token_ids) for group in groups for response in group)
    done = []
    for i, rows in enumerate(portions):
        middle = (i + 0.5) / len(portions)
        share = session.spent(step - 1 + middle, middle * tokens)
        budget = session.token_budget
        done.append(
            update(policy, session.optimizer, recipe, share, rows, budget, session.distributed)
        )
        _lower_budget(session, done[-1].token_budget)
    session.tokens += tokens
    return combined(done)


def _lower_budget(session: Session, token_budget: int) -> None:
    """Stay with the smaller micro-batches that a step had to fall back on."""
    if token_budget < session.token_budget:
        session.console.print(
            f"out of memory: train.micro_batch_tokens lowered from {session.token_budget:,} to "
            f"{token_budget:,}, the step repeated"
        )
        session.token_budget = token_budget


def _dry_step(session: Session) -> None:
    """Forward and backward of the largest micro-batch that can come, before hours are spent."""
    recipe, policy = session.recipe, session.policy
    longest = max((p.prompt_ids for p in session.problems), key=len)
    answer = (policy.pad_id,) * recipe.rollout.max_tokens
    # Prompts differ in their first token, so that a group shares one and no more.
    rows = [
        Row((number, *longest[1:]), answer)
        for number in range(recipe.train.problems_per_step)
        for _ in range(recipe.group.size)
    ]
    batches = policy.batches(rows, session.token_budget)
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    rows = [rows[i] for i in largest.row.unique().tolist()]
    # Each process by itself, since each has a GPU of its own to try.
    budget = gradient(policy, recipe, rows, session.token_budget).token_budget
    _lower_budget(session, min(session.distributed.all_gather([budget])))
    policy.model.zero_grad(set_to_none=True)


def _split(items: list[Any], parts: int) -> list[list[Any]]:
    """`items` in `parts` nearly equal portions, empty ones left out."""
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(bounds) if b > a]


def _rows(session: Session, part: Sequence[tuple[Group, Sequence[float]]]) -> list[Row]:
    """The rows that one update trains on, weighted by the recipe's reduction."""
    masked = session.recipe.objective.mask_truncated
    rows = [
        (group.problem.prompt_ids, response.token_ids, advantage)
        for group, advantages in part
        for response, advantage in zip(group, advantages, strict=True)
        if response.token_ids and not (masked and response.truncated)
    ]
    weights = session.token_weights([len(ids) for _, ids, _ in rows])
    return [Row(*row, weight) for row, weight in zip(rows, weights, strict=True)]
