"""Attention over the segments of a packed line: a prompt once, its responses after it.

Registered with transformers as an attention function. Without segments, in generation and for
padded rows, it calls transformers' own sdpa.

Axis suffixes: H query heads, H_kv key and value heads, S tokens of the line, D size of a head.
"""

from __future__ import annotations

import contextlib
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

from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Segment

NAME = "gft_lite_segments"
# The longest segment of a tile has at most this multiple of the length of the shortest.
TILE_PADDING = 1.25


SHORT_WINDOW = 3  # Shorter than the rows with which a layout is tried.


class Unsupported(RuntimeError):
    """The model's attention has a feature that segment attention lacks."""


class SegmentAttention:
    """Causal attention within each segment, and from it to every token of its prompt."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._segments = segments
        self._device = device
        self._varlen: _Varlen | None = None
        self._tiles: list[_Tile] = []

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
        window: int | None = None, dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """The attention output, restricted to the last `window` tokens if given.

        Shapes: query [1, H, S, D], key and value [1, H_kv, S, D] -> [1, S, H, D].
        """
        # torch's flash kernel supports half precision on CUDA, without dropout.
        half = query.dtype in (torch.bfloat16, torch.float16)
        if query.device.type != "cpu" and half and not dropout:
            self._varlen = self._varlen or _Varlen(self._segments, self._device)
            return self._varlen(query, key, value, scale, window)
        if not self._tiles:
            self._tiles = [_Tile(part, self._device) for part in _group_by_length(self._segments)]
            self._order = torch.cat([tile.places for tile in self._tiles]).argsort()
        parts = [tile(query, key, value, scale, window, dropout) for tile in self._tiles]
        return torch.cat(parts)[self._order].unsqueeze(0)


class _Varlen:
    """torch's flash attention for segments of any length; keys are copied once per segment."""

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
    """A batch of segments of similar length whose prompts have equal length.

    Shorter segments are padded with their last token. The outputs there are dropped, and the
    causal mask hides the padding from all real tokens.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        longest = max(s.end - s.start for s in segments)
        self._prompt = segments[0].prompt_end - segments[0].prompt_start
        own = [[min(s.start + i, s.end - 1) for i in range(longest)] for s in segments]
        keys = [[*range(s.prompt_start, s.prompt_end), *o]
                for s, o in zip(segments, own, strict=True)]  # fmt: skip
        real = [
            line * longest + i for line, s in enumerate(segments) for i in range(s.end - s.start)
        ]
        self._queries = torch.tensor(own, device=device)
        self._keys = torch.tensor(keys, device=device)
        self._real = torch.tensor(real, device=device)
        self.places = self._queries.flatten()[self._real]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
        window: int | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        """The output of the tile's tokens, in the order of `places`.

        Shapes: as in SegmentAttention -> [tokens, H, D].
        """
        queries = query[0][:, self._queries].transpose(0, 1)
        keys, values = (x[0][:, self._keys].transpose(0, 1) for x in (key, value))
        square = not self._prompt and window is None
        out = scaled_dot_product_attention(
            queries, keys, values, None if square else self._mask(window), dropout_p=dropout,
            is_causal=square, scale=scale, enable_gqa=queries.shape[1] != keys.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1)[self._real]

    def _mask(self, window: int | None) -> Tensor:
        """True where a query attends to a key. Shape: [longest, prompt + longest]."""
        own = self._queries.shape[1]
        all_keys = torch.ones(own, self._prompt + own, dtype=torch.bool, device=self.places.device)
        mask = all_keys.tril(self._prompt)
        return mask.triu(self._prompt - window + 1) if window else mask


def _group_by_length(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Segments grouped into tiles."""
    tile: list[Segment] = []
    for s in sorted(segments, key=lambda s: (s.prompt_end - s.prompt_start, s.start - s.end)):
        if tile and not _fits_tile(s, tile[0]):
            yield tile
            tile = []
        tile.append(s)
    yield tile


def _fits_tile(segment: Segment, longest: Segment) -> bool:
    """True if a tile whose longest segment is `longest` may hold `segment`."""
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
    """The attention function that transformers calls. Raises: Unsupported."""
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    unsupported = [n for n in ("softcap", "s_aux", "position_bias") if others.get(n) is not None]
    if unsupported:
        raise Unsupported(f"attention with {', '.join(unsupported)}")
    return segments(query, key, value, scaling, sliding_window, dropout), None


def describe_layout(policy: Policy) -> str:
    """The layout of micro-batches, and what a model without shared prompts loses."""
    settings, kind = policy.settings, policy.config.model_type
    if policy.layout == "shared" or settings.layout != "auto":
        return policy.layout
    with_what = f"backend {settings.backend} and attention {settings.attention}"
    lost = "each response computes its prompt again"
    if policy.layout == "padded":
        lost += ", and shorter rows are padded"
    return f"{policy.layout}; {kind} with {with_what} does not support shared: {lost}"


@contextlib.contextmanager
def short_windows(model: Any) -> Iterator[None]:
    """Sliding windows of SHORT_WINDOW tokens, for the length of a `with`.

    A model that applies its window by the mask alone then gives other states with segments, which
    have no mask, and its layout is not chosen.
    """
    owners = [model.config.get_text_config(), *model.modules()]
    windows = [(each, vars(each).get("sliding_window")) for each in owners]
    windows = [(each, window) for each, window in windows if type(window) is int]
    for each, _ in windows:
        each.sliding_window = SHORT_WINDOW
    try:
        yield
    finally:
        for each, window in windows:
            each.sliding_window = window


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
