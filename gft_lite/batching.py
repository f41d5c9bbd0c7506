"""Scored groups to training rows, and rows to micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One response to train on: its tokens, its advantage, and the weight of each token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    advantage: float = 1.0
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Right-padded rows for one forward pass.

    Per-token values of a micro-batch are flat: the response tokens of all rows, one after
    another, so that nothing is computed for prompts and padding.

    Shapes: input_ids, attention_mask, is_response [B, S]; advantages, weights, row [T].
    `row` is the place of each token's row in the list that was cut up.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_response: Tensor
    advantages: Tensor
    weights: Tensor
    row: Tensor

    @property
    def targets(self) -> Tensor:
        """The response tokens [T]."""
        return self.input_ids[self.is_response]

    @property
    def before_targets(self) -> Tensor:
        """Where each target is predicted: the positions just before, a mask [B, S]."""
        return self.is_response.roll(-1, dims=1)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on another device."""
        return MicroBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def cut(
    rows: Sequence[Row], token_budget: int, *, pad_id: int = 0, max_rows: int | None = None
) -> list[MicroBatch]:
    """Cut rows into micro-batches of at most `token_budget` tokens, padding included.

    Rows of like length share a micro-batch; a single row longer than the budget gets one of
    its own. Rows without response tokens are left out.
    """
    order = sorted((i for i, r in enumerate(rows) if r.response_ids), key=lambda i: -len(rows[i]))
    batches: list[list[int]] = []
    for i in order:
        batch = batches[-1] if batches else []
        fits = batch and (len(batch) + 1) * len(rows[batch[0]]) <= token_budget
        if fits and (max_rows is None or len(batch) < max_rows):
            batch.append(i)
        else:
            batches.append([i])
    return [_collate(rows, batch, pad_id) for batch in batches]


def _collate(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> MicroBatch:
    width = max(len(rows[i]) for i in indices)
    input_ids = torch.full((len(indices), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    is_response = torch.zeros_like(input_ids, dtype=torch.bool)
    for line, i in enumerate(indices):
        row = rows[i]
        input_ids[line, : len(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        attention_mask[line, : len(row)] = 1
        is_response[line, len(row.prompt_ids) : len(row)] = True
    lengths = torch.tensor([len(rows[i].response_ids) for i in indices])

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.get_default_dtype()).repeat_interleave(lengths)

    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        is_response=is_response,
        advantages=per_token([rows[i].advantage for i in indices]),
        weights=per_token([rows[i].weight for i in indices]),
        row=torch.tensor(indices).repeat_interleave(lengths),
    )
