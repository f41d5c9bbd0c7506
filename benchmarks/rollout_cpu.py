"""Tokens that vLLM samples with an adapter on a CPU, before and after each of three changes.

They are: a KV cache for all rows instead of 64 MiB, one LoRA product per adapter instead of one per
token, bfloat16 instead of fp32. Each engine is a process of its own with one thread; they take
turns, and time is the process's CPU time, so that other load on the machine matters little. The
machine's limit follows from the measured bf16 rate and memory bandwidth of one thread: a step of
decoding reads every weight once and multiplies it with every row.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_model import find_real_model
from benchmarks.record import record
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout.base import Request, Sampling
from gft_lite.rollout.vllm_engine import VllmEngine
from gft_lite.utils.errors import UserError

CONTEXT, PROMPTS, SAMPLES, PROMPT_TOKENS = 512, 4, 7, 80
ROWS, WARM_UP_TOKENS = PROMPTS * SAMPLES, 4
ENGINES: dict[str, dict[str, Any]] = {
    "fp32, 64 MiB": {"dtype": "float32", "kv_cache_mib": 64},
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
}


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine samples with: the adapter or the base, and whose LoRA functions."""

    engine: str
    adapter: bool = True
    vllms_own: bool = False


JOBS = {
    "before": Job("fp32, 64 MiB", vllms_own=True),
    "kv_cache": Job("fp32", vllms_own=True),
    "kv_cache, lora": Job("fp32"),
    "kv_cache, lora, bf16": Job("bf16"),
    "bf16, vLLM's own lora": Job("bf16", vllms_own=True),
    "bf16, no adapter": Job("bf16", adapter=False),
}


def serve(connection: Connection, model: str, settings: dict[str, Any]) -> None:
    """Start an engine, then run jobs of `max_tokens` tokens until None arrives."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        policy = load_policy(PolicySettings(model=model, device="cpu", context=CONTEXT))
        for parameter in policy.parameters().values():
            generator = torch.Generator().manual_seed(0)
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 1e-3)
        options = RolloutSettings(engine="vllm", batch_size=ROWS, **settings)
        engine = VllmEngine(options, policy, Path(name))
        adapter = policy.save_adapter(Path(name) / "adapter")
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(100, 40_000, (PROMPTS, PROMPT_TOKENS), generator=generator)
        requests = [Request(tuple(ids), tuple(range(SAMPLES))) for ids in draws.tolist()]
        connection.send(engine.base)
        while (received := connection.recv()) is not None:
            job, max_tokens = received
            use_lora_functions(own=job.vllms_own)
            engine.sync(adapter if job.adapter else None, 1)
            start = time.process_time()
            groups = engine.generate(requests, Sampling(max_tokens=max_tokens))
            seconds = time.process_time() - start
            connection.send(sum(len(c.token_ids) for group in groups for c in group) / seconds)
        engine.close()


def use_lora_functions(*, own: bool) -> None:
    """Put vLLM's own functions, or ours, where vLLM looks them up."""
    from vllm.lora.ops import torch_ops
    from vllm.lora.punica_wrapper import punica_cpu

    from gft_lite.rollout.vllm_cpu_lora import REPLACEMENTS

    for function in REPLACEMENTS:
        name = function.__name__
        setattr(punica_cpu, name, getattr(torch_ops, name) if own else function)


def compare(model: str, rounds: int, max_tokens: int) -> dict[str, Any]:
    """Tokens per CPU-second of each job, and its ratio to the first, both by round."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    context, engines = get_context("spawn"), {}
    for name, settings in ENGINES.items():
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, model, settings), daemon=True)
        process.start()
        there.close()
        print(f"{name}: {here.recv()}", flush=True)
        engines[name] = process, here
    rates: dict[str, list[float]] = {name: [] for name in JOBS}
    limits = []
    for number in range(-1, rounds):
        if number >= 0:
            limits.append(limit(model))
        for name, job in JOBS.items():
            connection = engines[job.engine][1]
            connection.send((job, max_tokens if number >= 0 else WARM_UP_TOKENS))
            rate = connection.recv()
            if number >= 0:
                rates[name].append(rate)
                print(f"round {number + 1}, {name}: {rate:.0f} tokens/CPU-second", flush=True)
    for process, connection in engines.values():
        connection.send(None)
        process.join()
    ratios = {name: [x / y for x, y in zip(found, rates["before"], strict=True)]
              for name, found in rates.items()}  # fmt: skip
    shares = [x / y["tokens_per_cpu_second"]
              for x, y in zip(rates["kv_cache, lora, bf16"], limits, strict=True)]  # fmt: skip
    return {
        "rows": ROWS, "prompt_tokens": PROMPT_TOKENS, "max_tokens": max_tokens,
        "tokens_per_cpu_second": rates, "ratio": ratios,
        "median_ratio": {name: statistics.median(found) for name, found in ratios.items()},
        "limit": limits, "share_of_limit": shares,
    }  # fmt: skip


def limit(model: str, rows: int = ROWS, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """The most tokens per CPU-second that one thread can decode, from two small kernels."""
    from gft_lite.planning.model_shape import find_shape

    shape = find_shape(model)
    # The matrices of the layers and of the output head, without the adapter and attention.
    parameters = shape.linear_parameters + shape.embedding_parameters
    torch.set_num_threads(1)
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    flops = 2 * 2048**3 / fastest(lambda: a @ b)
    large = torch.ones(1 << 26)
    bandwidth = large.nbytes / fastest(large.sum)
    seconds = max(2 * parameters * rows / flops, dtype.itemsize * parameters / bandwidth)
    return {"gflops": flops / 1e9, "gb_per_second": bandwidth / 1e9,
            "tokens_per_cpu_second": rows / seconds}  # fmt: skip


def fastest(function: Any, turns: int = 5) -> float:
    """CPU-seconds of the fastest of a few calls."""
    best = float("inf")
    for _ in range(turns):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    """Measure, print and record; says why where it can't."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a folder; by default that of real_model.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        return print("skipped: vllm is not installed")
    try:
        model = arguments.model or str(find_real_model())
    except UserError as error:
        return print(f"skipped: {error}")
    figures = compare(model, arguments.rounds, arguments.tokens)
    for name, ratio in figures["median_ratio"].items():
        rate = statistics.median(figures["tokens_per_cpu_second"][name])
        print(f"{name}: {rate:.0f} tokens/CPU-second, {ratio:.2f} times before")
    print(f"share of the machine's limit: {statistics.median(figures['share_of_limit']):.0%}")
    print(f"written: {record('rollout_cpu', figures)}")


if __name__ == "__main__":
    main()
