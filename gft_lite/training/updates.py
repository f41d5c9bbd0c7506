"""What optimiser steps did: sums that add up, and the metrics of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gft_lite.objective.importance import Importance, gap_metrics


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean that can be added to others: the sum and the number of values."""

    sum: float = 0.0
    count: int = 0

    @property
    def value(self) -> float | None:
        """The mean; None without values."""
        return self.sum / self.count if self.count else None

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """The mean of a metric over the tokens that it applies to: those that are not NaN."""
        values = values.detach().to(torch.get_default_dtype())
        applies = ~values.isnan()
        total, count = torch.stack([values[applies].sum(), applies.sum()]).tolist()
        return cls(total, int(count))


def add_means(parts: Sequence[Mapping[str, Mean]]) -> dict[str, Mean]:
    """The means of all values, by name."""
    names = dict.fromkeys(name for part in parts for name in part)
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {
        name: Mean(sum(m.sum for m in means), sum(m.count for m in means))
        for name, means in found.items()
    }


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    """A micro-batch's share of the loss, its metrics, and trainer - engine log-probs in nats of
    the self tokens [T]."""

    loss: float
    metrics: Mapping[str, Mean]
    gaps: Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimiser step did.

    `skipped` is "flat" if no row had an advantage, "non_finite" if loss or gradient was not
    finite; the weights have not moved then. `tokens` are response tokens, `forwarded` all tokens
    that went through the model, prompts and padding included. `micro_batch_tokens` is the limit
    that the step ended with. `metrics` are means per response token: entropy and what the loss
    reports. `gaps` are the differences trainer - engine in nats of the self tokens' log-probs.
    """

    lr: float
    micro_batch_tokens: int
    tokens: int = 0
    forwarded: int = 0
    loss: float = 0.0
    grad_norm: float | None = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)
    gaps: Tensor = field(default_factory=lambda: torch.empty(0))
    skipped: Literal["flat", "non_finite"] | None = None


def aggregate_updates(updates: Sequence[Update], importance: Importance) -> dict[str, Any]:
    """The metrics of the updates of one step, as metrics.jsonl has them."""
    gaps = torch.cat([u.gaps for u in updates])
    ran = [u for u in updates if u.tokens]
    skipped = [u.skipped for u in updates if u.skipped]
    means = {name: mean.value for name, mean in add_means([u.metrics for u in ran]).items()}
    norms = [u.grad_norm for u in ran if u.grad_norm is not None]
    metrics = {
        "updates": len(updates) - len(skipped),
        "skipped": ", ".join(skipped) or None,
        "lr": updates[-1].lr,
        "trained_tokens": sum(u.tokens for u in ran),
        "forwarded_tokens": sum(u.forwarded for u in ran),
        "micro_batch_tokens": updates[-1].micro_batch_tokens,
        "loss": sum(u.loss for u in ran) / len(ran) if ran else None,
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "entropy": _finite(means.pop("entropy", None)),
        # Also under "objective"; here since the first version of the file.
        "rectified": _finite(means.get("rectified")),
        "objective": {name: _finite(value) for name, value in means.items()},
        "engine_gap": gap_metrics(gaps, importance),
    }
    # JSON has no NaN; `skipped` says that a figure was not finite.
    return {name: _finite(v) if isinstance(v, float) else v for name, v in metrics.items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
