"""Attention over the segments of a packed line: a prompt once, its responses after it.

A transformers decoder takes it as its attention function; without segments (generation, padded
rows) it is transformers' own sdpa.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gft_lite.policy.batching import Segment

NAME = "gft_lite_segments"
# Segments that are computed side by side may differ in length by this factor.
TILE_PADDING = 1.25


class Unsupported(RuntimeError):
    """The model's attention does something that segments don't."""


class SegmentAttention:
    """Causal attention within each segment and to the whole of its prompt."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._segments = segments
        self._device = device
        self._varlen: _Varlen | None = None
        self._tiles: list[_Tile] = []

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
        window: int | None = None, dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Attend, to no more than the last `window` tokens.

        Shapes: query [1, H, S, D], key and value [1, H_kv, S, D] -> [1, S, H, D].
        """
        # The flash kernel of torch is for half precision on CUDA, without dropout.
        half = query.dtype in (torch.bfloat16, torch.float16)
        if query.device.type != "cpu" and half and not dropout:
            self._varlen = self._varlen or _Varlen(self._segments, self._device)
            return self._varlen(query, key, value, scale, window)
        if not self._tiles:
            self._tiles = [_Tile(part, self._device) for part in _alike(self._segments)]
            self._order = torch.cat([tile.places for tile in self._tiles]).argsort()
        parts = [tile(query, key, value, scale, window, dropout) for tile in self._tiles]
        return torch.cat(parts)[self._order].unsqueeze(0)


class _Varlen:
    """Torch's flash attention for segments of any length; each key gathered once per segment."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        keys = [[*range(s.prompt_start, s.prompt_end), *range(s.start, s.end)] for s in segments]
        queries = [s.end - s.start for s in segments]

        def ends(lengths: Sequence[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

        self._keys = torch.tensor([k for part in keys for k in part], device=device)
        self._lengths = (ends(queries), ends([len(part) for part in keys]))
        self._longest = (max(queries), max(len(part) for part in keys))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        out: Any = varlen_attn(
            query, key[self._keys], value[self._keys], *self._lengths, *self._longest,
            scale=scale, window_size=(window - 1 if window else -1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.unsqueeze(0)


class _Tile:
    """Segments of like length with prompts of one length, side by side.

    A shorter segment is filled up with its last token: what is computed there is dropped, and
    no real token looks so far ahead.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        longest = max(s.end - s.start for s in segments)
        self._prompt = segments[0].prompt_end - segments[0].prompt_start
        own = [[min(s.start + i, s.end - 1) for i in range(longest)] for s in segments]
        seen = [[*range(s.prompt_start, s.prompt_end), *o]
                for s, o in zip(segments, own, strict=True)]  # fmt: skip
        real = [
            line * longest + i for line, s in enumerate(segments) for i in range(s.end - s.start)
        ]
        self._queries = torch.tensor(own, device=device)
        self._keys = torch.tensor(seen, device=device)
        self._real = torch.tensor(real, device=device)
        self.places = self._queries.flatten()[self._real]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
        window: int | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        """Shapes: as above -> [tokens, H, D], in the order of `places`."""
        queries = query[0][:, self._queries].transpose(0, 1)
        keys, values = (x[0][:, self._keys].transpose(0, 1) for x in (key, value))
        square = not self._prompt and window is None
        out = scaled_dot_product_attention(
            queries, keys, values, None if square else self._mask(window), dropout_p=dropout,
            is_causal=square, scale=scale, enable_gqa=queries.shape[1] != keys.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1)[self._real]

    def _mask(self, window: int | None) -> Tensor:
        """Which of its [prompt + longest] keys each of the [longest] queries sees."""
        own = self._queries.shape[1]
        all_keys = torch.ones(own, self._prompt + own, dtype=torch.bool, device=self.places.device)
        mask = all_keys.tril(self._prompt)
        return mask.triu(self._prompt - window + 1) if window else mask


def _alike(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Segments that may share a tile."""
    tile: list[Segment] = []
    for s in sorted(segments, key=lambda s: (s.prompt_end - s.prompt_start, s.start - s.end)):
        if tile and not _joins(s, tile[0]):
            yield tile
            tile = []
        tile.append(s)
    yield tile


def _joins(segment: Segment, longest: Segment) -> bool:
    same_prompt = (
        segment.prompt_end - segment.prompt_start == longest.prompt_end - longest.prompt_start
    )
    return same_prompt and longest.end - longest.start <= TILE_PADDING * (
        segment.end - segment.start
    )


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    segments: SegmentAttention | None = None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    special = [n for n in ("softcap", "s_aux", "position_bias") if others.get(n) is not None]
    if special:
        raise Unsupported(f"attention with {', '.join(special)}")
    return segments(query, key, value, scaling, sliding_window, dropout), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
