"""The size of vLLM's KV cache on a CPU, by hand."""

from __future__ import annotations

import pytest

from gft_lite.planning.kv_cache import cpu_kv_cache, kv_bytes_per_token, smallest_kv_cache
from gft_lite.recipe.schema import Recipe

# SmolLM2-135M: 30 layers, 3 KV heads of 64, keys and values of 2 bytes.
PER_TOKEN = 2 * 30 * 3 * 64 * 2


def test_bytes_of_a_token():
    assert kv_bytes_per_token(30, 3, 64, 2) == PER_TOKEN == 23_040


@pytest.mark.parametrize(
    ("row_tokens", "rows", "free_gib", "tokens"),
    [
        (1024, 32, 16, 32 * 1024 + 32),  # 0.7 GiB, and the block that vLLM reserves.
        (1000, 32, 16, 32 * 1024 + 32),  # Whole blocks of 32 tokens.
        (1024, 1, 0, 1024 + 32),  # One sequence at least, whatever the RAM.
    ],
)
def test_a_cache_for_all_rows(row_tokens, rows, free_gib, tokens):
    assert cpu_kv_cache(PER_TOKEN, row_tokens, rows, free_gib << 30) == tokens * PER_TOKEN


def test_a_cache_takes_a_quarter_of_the_free_ram_at_most():
    assert cpu_kv_cache(PER_TOKEN, 8192, 128, 16 << 30) == 4 << 30


def test_the_smallest_cache_is_one_sequence():
    assert smallest_kv_cache(PER_TOKEN, 8192) == (8192 + 32) * PER_TOKEN


@pytest.mark.parametrize(("written", "size"), [("auto", "auto"), (None, "auto"), (64, 64)], ids=str)
def test_null_of_earlier_recipes_is_auto(written, size):
    rollout = Recipe.from_tree({"rollout": {"kv_cache_mib": written}}).rollout
    assert rollout.kv_cache_mib == size
