"""The size of the KV cache that a vLLM on the CPU starts with, for the engine and for the plan."""

from __future__ import annotations

import math

BLOCK_TOKENS = 32  # With vLLM's 128, shorter prompts would never be cached.
RAM_SHARE = 0.25  # Of the RAM that is free when the engine starts; training takes most of it.


def kv_bytes_per_token(layers: int, kv_heads: int, head_size: int, element: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * layers * kv_heads * head_size * element


def cpu_kv_cache(per_token: int, row_tokens: int, rows: int, free_ram: int) -> int:
    """Bytes for `rows` sequences of `row_tokens`, or what fits in a share of the free RAM.

    It holds at least one sequence. vLLM takes all of it when it starts.
    """
    least, wanted = (_blocks(n, row_tokens) * BLOCK_TOKENS * per_token for n in (1, rows))
    return max(least, min(wanted, int(RAM_SHARE * free_ram)))


def smallest_kv_cache(per_token: int, row_tokens: int) -> int:
    """Bytes of the smallest KV cache that holds one sequence, without which vLLM can't start."""
    return cpu_kv_cache(per_token, row_tokens, 1, 0)


def _blocks(rows: int, row_tokens: int) -> int:
    return rows * math.ceil(row_tokens / BLOCK_TOKENS) + 1  # vLLM reserves one.
