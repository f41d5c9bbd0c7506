"""Sixty hot-loads with the real vLLM engine: memory stays flat, all samples are right."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason='needs vllm: pip install "gft-lite[vllm]"'
)


@pytest.fixture(scope="module")
def figures():
    """The figures of a process without a history, whose memory would be that of other tests."""
    command = [sys.executable, "-m", "tests.integration.test_hot_loads"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_adapter_is_served_right_away(figures):
    assert figures["syncs"] == 60
    assert figures["wrong_greedy_answers"] == 0
    assert figures["worst_gap_nats"] < 1e-4
    # The adapters do answer differently, so that a stale one would show.
    assert figures["different_greedy_answers"] > 15
    assert figures["clock calls"] > 60


def test_memory_and_descriptors_stay_flat(figures):
    print({name: figures[name] for name in ("rss_kib_per_sync_median", "tensor_bytes")})
    adapter = figures["adapter_bytes"]
    first, last = figures["tensor_bytes"]
    assert last - first < adapter
    # What grows is safetensors: 64 bytes for each tensor it has ever read.
    assert figures["rss_kib_per_sync_median"] < adapter / 1024 / 2
    first, last = figures["descriptors"]
    assert first == last
    assert abs(figures["descriptors_per_sync"]) < 1e-6


def test_adapters_that_were_served_leave_the_disk(figures):
    assert figures["adapter_folders"] == 1
    assert figures["disk_bytes"] == figures["adapter_bytes"]


def main():
    """Print the figures of hot-loads under a clock that jumps forward and back by days."""
    import torch

    from benchmarks.hot_loads import hot_loads

    torch.set_num_threads(1)
    calls, real = itertools.count(), time.time
    time.time = lambda: real() + 86400 * (-1) ** (day := next(calls)) * day
    measured = hot_loads(syncs=60, warm_up=20)
    time.time = real
    print(json.dumps({**measured, "clock calls": next(calls)}))


if __name__ == "__main__":
    main()
