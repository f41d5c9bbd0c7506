"""Scored groups to training rows, and rows to micro-batches under a token budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gft_lite.types import SOURCES

Layout = Literal["shared", "packed", "padded"]


@dataclass(frozen=True, slots=True)
class Row:
    """One response to train on: its tokens, its advantage, and the weight of each token.

    `source` is the index in `types.SOURCES`, `success_share` the share of its group's self samples
    that are right. Where the loss needs them: `old_logprobs` [R] at the start of the step and
    `engine_logprobs` [R] as sampled, both in nats.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    advantage: float = 1.0
    weight: float = 1.0
    source: int = SOURCES.index("self")
    success_share: float = 0.0
    old_logprobs: Tensor | None = None
    engine_logprobs: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Segment(NamedTuple):
    """Tokens `start` to `end` of a packed line; they attend to their prompt and, causally, to each
    other."""

    prompt_start: int
    prompt_end: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows for one forward pass: side by side with padding, or in one line without.

    Per-token values are flat: the response tokens of all rows, one after another, so that
    nothing is computed for prompts and padding.

    Shapes: input_ids [B, S]; of padded rows attention_mask [B, S]; of a packed line (B = 1)
    position_ids [1, S] and its segments; predicts [T], the places in the flat [B * S] whose
    states predict the targets; all others [T]. `row` is the index of each token's row in the list
    of rows; `engine_logprobs` are NaN where no engine sampled the token.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    segments: tuple[Segment, ...]
    predicts: Tensor
    targets: Tensor
    advantages: Tensor
    weights: Tensor
    row: Tensor
    source: Tensor
    success_share: Tensor
    old_logprobs: Tensor | None = None
    engine_logprobs: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on another device."""

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return MicroBatch(*(moved(getattr(self, field.name)) for field in fields(self)))


def cut(
    rows: Sequence[Row], token_budget: int, *, pad_id: int = 0, layout: Layout = "padded"
) -> list[MicroBatch]:
    """Cut rows into micro-batches of at most `token_budget` tokens, padding included.

    `padded` rows stand side by side, those of like length together. `packed` rows follow each
    other in one line; `shared` has a prompt only once for all rows of the micro-batch that
    begin with it. A single row longer than the budget gets a micro-batch of its own. Rows
    without response tokens are left out.
    """
    order = sorted((i for i, r in enumerate(rows) if r.response_ids), key=lambda i: -len(rows[i]))
    if layout == "padded":
        return [_padded(rows, part, pad_id) for part in _of_like_length(rows, order, token_budget)]
    bundles = _bundles(rows, order, token_budget, shared=layout == "shared")
    return [_packed(rows, part) for part in _fitted(rows, bundles, token_budget)]


def _of_like_length(rows: Sequence[Row], order: Sequence[int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for i in order:
        batch = batches[-1] if batches else []
        if batch and (len(batch) + 1) * len(rows[batch[0]]) <= budget:
            batch.append(i)
        else:
            batches.append([i])
    return batches


def _bundles(
    rows: Sequence[Row], order: Sequence[int], budget: int, *, shared: bool
) -> list[list[int]]:
    """Rows that share a prompt, as many together as the budget takes; else each by itself."""
    bundles: dict[object, list[list[int]]] = {}
    for i in order:
        key = rows[i].prompt_ids if shared else i
        same = bundles.setdefault(key, [])
        if same and _size(rows, same[-1]) + len(rows[i].response_ids) <= budget:
            same[-1].append(i)
        else:
            same.append([i])
    return [bundle for same in bundles.values() for bundle in same]


def _fitted(
    rows: Sequence[Row], bundles: Sequence[list[int]], budget: int
) -> list[list[list[int]]]:
    """Bundles to micro-batches: the largest first, each where it first fits."""
    batches: list[list[list[int]]] = []
    room: list[int] = []
    for bundle in sorted(bundles, key=lambda bundle: -_size(rows, bundle)):
        size = _size(rows, bundle)
        place = next((i for i, left in enumerate(room) if size <= left), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(budget)
        batches[place].append(bundle)
        room[place] -= size
    return batches


def _size(rows: Sequence[Row], bundle: Sequence[int]) -> int:
    return len(rows[bundle[0]].prompt_ids) + sum(len(rows[i].response_ids) for i in bundle)


def _padded(rows: Sequence[Row], indices: Sequence[int], pad_id: int) -> MicroBatch:
    width = max(len(rows[i]) for i in indices)
    input_ids = torch.full((len(indices), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    predicts: list[int] = []
    for line, i in enumerate(indices):
        row = rows[i]
        input_ids[line, : len(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        attention_mask[line, : len(row)] = 1
        first = line * width + len(row.prompt_ids) - 1
        predicts += range(first, first + len(row.response_ids))
    return MicroBatch(input_ids, attention_mask, None, (), torch.tensor(predicts),
                      **_per_token(rows, indices))  # fmt: skip


def _packed(rows: Sequence[Row], bundles: Iterable[Sequence[int]]) -> MicroBatch:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predicts: list[int] = []
    for bundle in bundles:
        prompt = rows[bundle[0]].prompt_ids
        start, end = len(ids), len(ids) + len(prompt)
        ids += prompt
        positions += range(len(prompt))
        if len(bundle) > 1:
            segments.append(Segment(start, start, start, end))
        for i in bundle:
            first, response = len(ids), rows[i].response_ids
            ids += response
            positions += range(len(prompt), len(rows[i]))
            # A prompt with one response is one causal segment.
            alone = Segment(start, start, start, len(ids))
            segments.append(alone if len(bundle) == 1 else Segment(start, end, first, len(ids)))
            predicts += [end - 1, *range(first, len(ids) - 1)]
    indices = [i for bundle in bundles for i in bundle]
    return MicroBatch(torch.tensor([ids]), None, torch.tensor([positions]), tuple(segments),
                      torch.tensor(predicts), **_per_token(rows, indices))  # fmt: skip


def _per_token(rows: Sequence[Row], indices: Sequence[int]) -> dict[str, Any]:
    """The fields of a micro-batch that have a value for each response token."""
    chosen = [rows[i] for i in indices]
    lengths = torch.tensor([len(row.response_ids) for row in chosen])

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.get_default_dtype()).repeat_interleave(lengths)

    engine = None
    if any(row.engine_logprobs is not None for row in chosen):
        unknown = [math.nan]
        engine = torch.tensor(
            [x for r in chosen for x in r.engine_logprobs or unknown * len(r.response_ids)]
        )
    old = [row.old_logprobs for row in chosen if row.old_logprobs is not None]
    return {
        "targets": torch.tensor([token for row in chosen for token in row.response_ids]),
        "advantages": spread([row.advantage for row in chosen]),
        "weights": spread([row.weight for row in chosen]),
        "row": torch.tensor(indices).repeat_interleave(lengths),
        "source": torch.tensor([row.source for row in chosen]).repeat_interleave(lengths),
        "success_share": spread([row.success_share for row in chosen]),
        "engine_logprobs": engine,
        "old_logprobs": torch.cat(old) if old else None,
    }
