"""Which rows of a group are trained, and which demonstration prefixes stand before self samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Annotated

from pydantic import Field

from gft_lite.types import ScoredGroup

Share = Annotated[float, Field(ge=0, le=1)]


def select_by_gate(scored: ScoredGroup, *, gate: Annotated[int, Field(ge=0)] = 0) -> list[bool]:
    """HPT: the demonstrations if few self samples are right, else the self samples.

    A problem without demonstrations has its self samples. Source: `switch` in `mix_trainer.py` of
    TsinghuaC3I/Unify-Post-Training; gate 0 for Qwen, 2 for Llama.

    Args:
        gate: A problem is trained by its demonstrations if at most this many of its self samples
            are right, else by its self samples.
    """
    responses = scored.group.responses
    right = sum(scored.is_right(r) for r in responses if r.source == "self")
    demonstrated = any(r.source != "self" for r in responses)
    return [(r.source != "self") == (right <= gate and demonstrated) for r in responses]


def select_unsolved(scored: ScoredGroup) -> list[bool]:
    """ReLIFT: the self samples, and the demonstrations of a problem that none of them solves."""
    unsolved = not any(scored.is_right(r) for r in scored.group if r.source == "self")
    return [r.source == "self" or unsolved for r in scored.group]


def cosine_prefix(
    count: int, progress: float, random: Random, *, low: Share = 0.05, high: Share = 0.95
) -> Sequence[float]:
    """Prefix-RFT: one sample begins with a share U(b, `high`) of a demonstration, the others don't.

    b falls from `high` to `low` by a cosine of the progress. Source: `BetaSampler` and
    `CosineDecayController` in `scheduler/global_step.py` of ZeroYuHuang/prefix_rft.

    Args:
        low: Least share of a demonstration that is given at the end of the run; the share is drawn
            between the least one and `high`.
        high: Greatest share of a demonstration that is given, and the least one at the start.
    """
    bound = low + (high - low) * _cosine(progress)
    return [random.uniform(bound, high), *[0.0] * (count - 1)] if count else []


def binomial_hints(
    count: int,
    progress: float,
    random: Random,
    *,
    slices: Annotated[int, Field(ge=1)] = 5,
    low: Share = 0.05,
    high: Share = 0.95,
    hint_share: Share = 0.6,
) -> Sequence[float]:
    """UFT: all samples of a group begin with the same hint, Binomial(`slices`, q) of its slices.

    q falls from `high` to `low` by a cosine. Source: `rl_dataset.py` of liumy2010/UFT, 300 of 500
    steps.

    Args:
        slices: Number of equal slices of a demonstration; a hint is the first few of them.
        low: Probability q, which is the mean share of a demonstration in a hint, at the end of the
            hints.
        high: The same probability at the start.
        hint_share: Share of the budget with hints; there are none after it.
    """
    if progress >= hint_share:
        return [0.0] * count
    q = low + (high - low) * _cosine(progress / hint_share)
    return [sum(random.random() < q for _ in range(slices)) / slices] * count


def _cosine(progress: float) -> float:
    """1 at the start and 0 at the end."""
    return (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
