"""Group advantages: rewards compared within their group."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


Std = Literal["sample", "population", "none"]


def group_advantages(
    rewards: Tensor | Sequence[float], *, std: Std = "sample", eps: float = 1e-6
) -> Tensor:
    """Rewards normalised within their group (Eq. 4): `(R_k - mean) / (std + eps)`.

    The whole group counts, whatever the sources. `std="none"` only centres (Dr. GRPO).
    A flat group gives exact zeros; a group of one gives its reward (mean 0, std 1), as the
    authors' code does.

    Shapes: rewards [..., K] -> advantages [..., K].
    Raises: ValueError for an empty group, a NaN or infinite reward, or an unknown std.
    """
    import torch  # Here, so that importing the module costs nothing.

    if std not in ("sample", "population", "none"):
        raise ValueError(f"std: must be sample, population or none, got {std!r}")
    exact = isinstance(rewards, torch.Tensor) and rewards.is_floating_point()
    values = torch.as_tensor(rewards, dtype=None if exact else torch.get_default_dtype())
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError("rewards: must hold at least one reward of a group, got none")
    if not bool(values.isfinite().all()):
        raise ValueError(f"rewards: must be finite, got {values.tolist()}")
    if values.shape[-1] == 1:
        return values.clone()
    centred = values - values.mean(-1, keepdim=True)
    if std != "none":
        spread = values.std(-1, keepdim=True, correction=1 if std == "sample" else 0)
        centred = centred / (spread + eps)
    # Rounding of the mean would give a flat group small advantages that are not zero.
    flat = values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)
    return centred.masked_fill(flat, 0.0)


def advantages_of(
    rewards: Sequence[float | None],
    *,
    std: Std = "sample",
    eps: float = 1e-6,
    baseline: Sequence[bool] | None = None,
) -> list[float]:
    """The advantages of a group in which some responses have no reward (None).

    A response without a reward has advantage 0 and is not part of mean and standard deviation.
    If only one of several responses has a reward, there is nothing to compare it with: 0.
    `baseline` says which responses make up mean and standard deviation, by default all. The others
    are compared with these; where these have equal rewards, their standard deviation counts as 1.

    Shapes: rewards [K], baseline [K] -> advantages [K].
    """
    members = baseline or [True] * len(rewards)
    graded = [r for r, inside in zip(rewards, members, strict=True) if inside and r is not None]
    if not graded or (len(graded) == 1 and sum(members) > 1):
        return [0.0] * len(rewards)
    values = iter(group_advantages(graded, std=std, eps=eps).tolist())
    mean = sum(graded) / len(graded)
    spread = statistics.stdev(graded) if std == "sample" and len(graded) > 1 else 0.0
    spread = statistics.pstdev(graded) if std == "population" else spread
    scale = spread + eps if spread else 1.0

    def advantage(reward: float | None, inside: bool) -> float:
        if reward is None:
            return 0.0
        return next(values) if inside else (reward - mean) / scale

    return [advantage(*pair) for pair in zip(rewards, members, strict=True)]
