"""Reductions: the weight of each token in the loss of an optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gft_lite.types import SOURCES, Source

Reduction = Literal["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True, slots=True)
class Part:
    """A term of a loss: the sources of the tokens that it is over, and the reduction of its own.

    `reduction` None is the recipe's `objective.reduction`.
    """

    sources: tuple[Source, ...] = SOURCES
    reduction: Reduction | None = None


def token_weights(
    lengths: Sequence[int], reduction: Reduction = "token_mean", max_tokens: int = 1
) -> list[float]:
    """The weight of each token of each row, so that the step's loss is one weighted sum.

    There is one denominator per optimiser step and part of the loss: however its rows are cut into
    micro-batches, summing `weight * per-token loss` gives the same gradient. `token_mean` divides
    by all tokens, `sequence_mean` by the row's length and the rows, `constant` (Dr. GRPO) by the
    rows and `max_tokens`. A row of length 0 has no token in the part: weight 0, not counted.

    Shapes: lengths [B] in tokens of the part -> weights [B].
    Raises: ValueError for an unknown reduction.
    """
    rows, tokens = sum(length > 0 for length in lengths), sum(lengths)
    if reduction == "token_mean":
        found = [1.0 / max(tokens, 1)] * len(lengths)
    elif reduction == "sequence_mean":
        found = [1.0 / (rows * max(length, 1)) if rows else 0.0 for length in lengths]
    elif reduction == "constant":
        found = [1.0 / (rows * max_tokens) if rows else 0.0 for _ in lengths]
    else:
        raise ValueError(
            f"reduction: must be token_mean, sequence_mean or constant, got {reduction!r}"
        )
    return [weight if length else 0.0 for weight, length in zip(found, lengths, strict=True)]
