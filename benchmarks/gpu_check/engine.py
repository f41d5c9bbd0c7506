"""vLLM and the trainer on one device: checked hot-loads, sleep, and tokens per second."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.compat import adapt_vllm
from benchmarks.gpu_check.parts import Figures, Notes, Skip
from benchmarks.gpu_check.scale import SMALL, Setup
from benchmarks.gpu_check.work import make_groups, random_policy, timed
from benchmarks.hot_loads import PROMPT, measure
from gft_lite.policy.lora import LoraPolicy
from gft_lite.recipe.sections import RolloutSettings
from gft_lite.rollout.base import Request, Sampling

SYNCS, TINY_SYNCS = 20, 4


def check(setup: Setup, notes: Notes) -> None:
    """Measure the start, hot-loads, sleep and generation."""
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vllm is not installed")
    from gft_lite.rollout.vllm_engine import VllmEngine

    notes.add("vllm", {"adapted": adapt_vllm()})
    policy = random_policy(setup, setup.recipe(SMALL).policy)
    # On a CPU, the dtype that the limits of the hot-loads are for.
    dtype = "float32" if setup.device == "cpu" else "auto"
    settings = RolloutSettings(engine="vllm", gpu_memory=0.25, eager=True, dtype=dtype)
    started: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GFT_LITE_CACHE"] = folder  # A random base is not used again.

        def start() -> Figures:
            before, begin = _used_gib(), time.perf_counter()
            started.append(VllmEngine(settings, policy, Path(folder)))
            return {"seconds": time.perf_counter() - begin, "gib": _used_gib() - before}

        if notes.case("start", start) is None:
            return
        [engine] = started
        try:
            notes.case("hot_loads", hot_loads, setup, policy, engine, Path(folder) / "adapters")
            notes.case("sleep", sleep, setup, engine)
            notes.case("lora_slot", lora_slot, engine)
            notes.case("generate", generate, setup, policy, engine)
        finally:
            engine.close()


def hot_loads(setup: Setup, policy: LoraPolicy, engine: Any, adapters: Path) -> Figures:
    """Load adapters one after another and check each one."""
    syncs = TINY_SYNCS if setup.tiny else SYNCS
    return measure(policy, engine, adapters, syncs, warm_up=syncs // 2)


def sleep(setup: Setup, engine: Any) -> Figures:
    """The memory that sleep releases, and if the answers after waking are the same."""
    request, greedy = Request(PROMPT, (0,)), Sampling(temperature=0, max_tokens=8)
    before, awake = engine.generate([request], greedy), _used_gib()
    _, down = timed(setup, engine.sleep)
    asleep = _used_gib()
    _, up = timed(setup, engine.wake)
    return {
        "gib_awake": awake,
        "gib_asleep": asleep,
        "gib_awake_again": _used_gib(),
        "seconds_to_sleep": down,
        "seconds_to_wake": up,
        "right": engine.generate([request], greedy) == before,
    }


def lora_slot(engine: Any) -> Figures:
    """What a row of the base gets beside a row of an adapter, where vLLM has one adapter's slot.

    Training never mixes them; the log-probs say whether it could.
    """
    base, adapter = _prompt_logprobs(engine, None), _prompt_logprobs(engine, engine._lora)
    mixed = _prompt_logprobs(engine, engine._lora, None)
    return {
        "adapter_to_base_nats": (adapter - base).abs().max().item(),
        "adapter_row_gap_nats": (mixed[0] - adapter[0]).abs().max().item(),
        "base_row_gap_nats": (mixed[1] - base[0]).abs().max().item(),
    }


def _prompt_logprobs(engine: Any, *adapters: Any) -> Tensor:
    """Log-probs of one prompt's tokens in one batch, a row for each of `adapters`, [rows, T]."""
    from vllm import SamplingParams, TokensPrompt

    ids, found = list(PROMPT), {}
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    with engine._running() as llm:
        llm.reset_prefix_cache()
        for row, adapter in enumerate(adapters):
            prompt = TokensPrompt(prompt_token_ids=ids)
            llm.llm_engine.add_request(str(row), prompt, parameters, lora_request=adapter)
        while llm.llm_engine.has_unfinished_requests():
            found |= {o.request_id: o for o in llm.llm_engine.step() if o.finished}
    rows = [found[str(row)].prompt_logprobs[1:] for row in range(len(adapters))]
    return torch.tensor([[p[i].logprob for i, p in zip(ids[1:], r, strict=True)] for r in rows])


def generate(setup: Setup, policy: LoraPolicy, engine: Any) -> Figures:
    """Tokens per second over the batch's prompts, eight samples each of full length."""
    groups, length = make_groups(setup, policy.config.vocab_size), setup.sizes.response // 4
    seeds = tuple(range(setup.sizes.members))
    requests = [Request(tuple(group["prompt_ids"]), seeds) for group in groups]
    sampling = Sampling(max_tokens=length)
    engine.generate(requests[:1], Sampling(max_tokens=2))
    done, seconds = timed(setup, lambda: engine.generate(requests, sampling))
    tokens = sum(len(c.token_ids) for group in done for c in group)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def _used_gib() -> float:
    """GiB of the device that are in use, by all processes."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30
