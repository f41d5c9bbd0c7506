"""Two hundred hot-loads with the real vLLM engine: memory stays flat, all samples are right."""

from __future__ import annotations

import importlib.util
import itertools
import time

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason='needs vllm: pip install "gft-lite[vllm]"'
)


@pytest.fixture(scope="module")
def figures():
    """The figures of 200 hot-loads, under a clock that jumps forward and back by days."""
    import torch

    from benchmarks.hot_loads import hot_loads

    calls, real = itertools.count(), time.time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 86400 * (-1) ** (day := next(calls)) * day)
        measured = hot_loads()
    torch.set_num_threads(threads)
    return {**measured, "clock calls": next(calls)}


def test_every_adapter_is_served_right_away(figures):
    assert figures["syncs"] == 200
    assert figures["wrong_greedy_answers"] == 0
    assert figures["worst_gap_nats"] < 1e-4
    # The adapters do answer differently, so that a stale one would show.
    assert figures["different_greedy_answers"] > 50
    assert figures["clock calls"] > 200


def test_memory_and_descriptors_stay_flat(figures):
    # A tenth of an adapter. What grows is safetensors: 64 bytes for each tensor it has ever read.
    print(f"RSS: {figures['rss_kib_per_sync']:.1f} KiB per sync")
    assert figures["rss_kib_per_sync"] < figures["adapter_bytes"] / 1024 / 10
    first, last = figures["descriptors"]
    assert first == last
    assert abs(figures["descriptors_per_sync"]) < 1e-6


def test_adapters_that_were_served_leave_the_disk(figures):
    assert figures["adapter_folders"] == 1
    assert figures["disk_bytes"] == figures["adapter_bytes"]
