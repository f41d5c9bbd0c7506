"""Two hundred hot-loads in a row: memory, file descriptors and disk space of the process.

Trainer and engine share the process, so its memory is that of both. Every sync serves another
adapter and is compared with the trainer: the log-probs of a fixed completion, which must be neither
those of the base nor those of the previous adapter, and the greedy continuation of a prompt.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import record
from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout.base import Request, RolloutEngine, Sampling
from gft_lite.rollout.policy_engine import PolicyEngine
from gft_lite.rollout.registry import start_engine

SYNCS, WARM_UP = 200, 50
SETTINGS = RolloutSettings(engine="vllm", dtype="float32")
GREEDY = Sampling(temperature=0, max_tokens=8)
PROMPT, COMPLETION = tuple(range(5, 25)), (9, 33, 31, 14, 20, 12, 28, 26)


def hot_loads(syncs: int = SYNCS, warm_up: int = WARM_UP) -> dict[str, Any]:
    """The cost of `syncs` hot-loads; slopes are least squares without the first `warm_up`."""
    policy = load_policy(PolicySettings(device="auto", gradient_checkpointing=False))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        engine = start_engine(SETTINGS, policy, scratch)
        try:
            return measure(policy, engine, scratch / "adapters", syncs, warm_up)
        finally:
            engine.close()


def measure(
    policy: Policy, engine: RolloutEngine, adapters: Path, syncs: int, warm_up: int
) -> dict[str, Any]:
    """The cost of `syncs` hot-loads into an engine that is running."""
    served = PolicyEngine(engine, policy, adapters)
    noise = served.start_checks(Row(PROMPT, COMPLETION), SETTINGS.probe_limit)
    gaps, wrong, answers, seconds = [], 0, set(), []
    memory, descriptors, disk, tensors = [], [], [], []
    for version in range(1, syncs + 1):
        _change(policy, version)
        start = time.perf_counter()
        served.sync_unchecked(version)
        seconds.append(time.perf_counter() - start)
        gaps.append(served.check(engine))
        [[completion]] = engine.generate([Request(PROMPT, (0,))], GREEDY)
        answers.add(completion.token_ids)
        wrong += completion.token_ids != _greedy(policy, len(completion.token_ids))
        memory.append(_resident_kib())
        descriptors.append(len(os.listdir("/proc/self/fd")))
        disk.append(sum(f.stat().st_size for f in adapters.rglob("*") if f.is_file()))
        if version in (warm_up, syncs):
            tensors.append(_tensor_bytes())
    return {
        "syncs": syncs,
        "sync_seconds": float(np.median(seconds)),
        "noise_nats": noise,
        "worst_gap_nats": max(gaps),
        "wrong_greedy_answers": wrong,
        "different_greedy_answers": len(answers),
        "rss_mib": memory[-1] / 1024,
        "rss_kib_per_sync": _slope(memory[warm_up:]),
        "rss_kib_per_sync_median": _median_growth(memory[warm_up:]),
        "tensor_bytes": tensors,
        "descriptors": [descriptors[warm_up], descriptors[-1]],
        "descriptors_per_sync": _slope(descriptors[warm_up:]),
        "adapter_folders": len(list(adapters.iterdir())),
        "adapter_bytes": disk[0],
        "disk_bytes": max(disk),
    }


def _change(policy: Policy, version: int) -> None:
    """Replace the adapter by a random one with other answers."""
    generator = torch.Generator().manual_seed(version)
    for parameter in policy.parameters().values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@torch.no_grad()
def _greedy(policy: Policy, length: int) -> tuple[int, ...]:
    """The trainer's own greedy continuation."""
    ids = list(PROMPT)
    policy.model.eval()
    for _ in range(length):
        logits = policy.model(input_ids=torch.tensor([ids], device=policy.device)).logits
        ids.append(int(logits[0, -1].argmax()))
    policy.model.train()
    return tuple(ids[len(PROMPT) :])


def _resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def _tensor_bytes() -> int:
    """The bytes of all tensors that `gc` lists, each storage once (vLLM freezes older ones)."""
    gc.collect()
    # Not isinstance, which imports what a lazy object of another library stands for.
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _median_growth(values: list[int], window: int = 10) -> float:
    """The median growth per sync over `window` syncs, which one jump of the heap doesn't move."""
    window = min(window, len(values) - 1)
    return float(np.median(np.subtract(values[window:], values[:-window]))) / window


def _slope(values: list[int]) -> float:
    return float(np.polyfit(range(len(values)), values, 1)[0])


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--syncs", type=int, default=SYNCS)
    torch.set_num_threads(1)
    figures = hot_loads(parser.parse_args().syncs)
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(f"written: {record('hot_loads', figures)}")


if __name__ == "__main__":
    main()
