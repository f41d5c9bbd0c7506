"""Scored groups to training rows, and rows to micro-batches under a token budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gft_lite.types import SOURCES

Layout = Literal["shared", "packed", "padded"]


Weight = float | tuple[float, ...]
EXPERT, SELF = SOURCES.index("expert"), SOURCES.index("self")


@dataclass(frozen=True, slots=True)
class Row:
    """One response to train on: its tokens, its advantage, and the weight of each token.

    The weight is a number, or one for each part of the loss. `source` is the index in
    `types.SOURCES`. The first `prefix` response tokens are those of an expert's demonstration,
    with a weight of their own. `loss_inputs` are the inputs that the loss needs beside log-probs
    and advantage, by their names in `LossInputs`: a number, or a value per response token [R].
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    advantage: float = 1.0
    weight: Weight = 1.0
    source: int = SELF
    prefix: int = 0
    prefix_weight: Weight = 0.0
    loss_inputs: Mapping[str, float | Sequence[float] | Tensor] = field(default_factory=dict)

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
    states predict the targets; weights [T], or [P, T] for the P parts of a loss; all others and
    each of `loss_inputs` [T], NaN where a row has no value. `row` is the index of each token's row
    in the list of rows.
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
    loss_inputs: Mapping[str, Tensor]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on another device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: tensor.to(device) for name, tensor in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        return MicroBatch(*(moved(getattr(self, field.name)) for field in fields(self)))

    def by_row(self, values: Tensor) -> dict[int, Tensor]:
        """Values of the response tokens [T] as those of each row [R], by the row's index."""
        rows = self.row.to(values.device)
        return {i: values[rows == i] for i in rows.unique().tolist()}


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
    dtype = torch.get_default_dtype()
    names = dict.fromkeys(name for row in chosen for name in row.loss_inputs)
    return {
        "targets": torch.tensor([token for row in chosen for token in row.response_ids]),
        "advantages": torch.tensor([row.advantage for row in chosen], dtype=dtype)
        .repeat_interleave(lengths),
        "weights": torch.cat([_weights(row, dtype) for row in chosen], -1),
        "row": torch.tensor(indices).repeat_interleave(lengths),
        "source": torch.cat([_sources(row) for row in chosen]),
        "loss_inputs": {
            name: torch.cat([_spread(row, name, dtype) for row in chosen]) for name in names
        },
    }  # fmt: skip


def _weights(row: Row, dtype: torch.dtype) -> Tensor:
    """The weights of a row's response tokens, [R] or [P, R]."""
    own, prefix = (
        torch.tensor(weight, dtype=dtype)[..., None] for weight in (row.weight, row.prefix_weight)
    )
    rest = own.expand(*own.shape[:-1], len(row.response_ids) - row.prefix)
    return torch.cat([prefix.expand(*own.shape[:-1], row.prefix), rest], -1) if row.prefix else rest


def _sources(row: Row) -> Tensor:
    return torch.tensor([EXPERT] * row.prefix + [row.source] * (len(row.response_ids) - row.prefix))


def _spread(row: Row, name: str, dtype: torch.dtype) -> Tensor:
    """A loss input of a row as a value per response token [R]."""
    value = torch.as_tensor(row.loss_inputs.get(name, math.nan), dtype=dtype)
    return value.expand(len(row.response_ids))
