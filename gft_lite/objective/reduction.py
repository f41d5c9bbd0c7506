"""Reductions: the weight of each token in the loss of an optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Reduction = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(
    lengths: Sequence[int], reduction: Reduction = "token_mean", max_tokens: int = 1
) -> list[float]:
    """The weight of each token of each row, so that the step's loss is one weighted sum.

    There is one denominator per optimiser step: however its rows are cut into micro-batches,
    summing `weight * per-token loss` gives the same gradient. `token_mean` divides by all
    response tokens, `sequence_mean` by the row's length and the rows, `constant` (Dr. GRPO)
    by the rows and `max_tokens`.

    Shapes: lengths [B] in tokens -> weights [B].
    Raises: ValueError for an unknown reduction.
    """
    rows, tokens = len(lengths), sum(lengths)
    if reduction == "token_mean":
        return [1.0 / max(tokens, 1)] * rows
    if reduction == "sequence_mean":
        return [1.0 / (rows * max(length, 1)) for length in lengths]
    if reduction == "constant":
        return [1.0 / (rows * max_tokens) for _ in lengths]
    raise ValueError(f"reduction: must be token_mean, sequence_mean or constant, got {reduction!r}")
