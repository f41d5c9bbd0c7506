"""Tokens/s of rollout and training on the lab, compared with transformers alone.

Peers: `model.generate` with the same prompts, samples and tokens; and a training pass that
takes the full logits of every position. One process, one thread, alternating, best of several
runs, which is the one least affected by other load.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.record import peak_rss_mib, record
from gft_lite.objective.losses import LossInputs, gft_loss
from gft_lite.policy.base import Policy
from gft_lite.policy.batching import MicroBatch, Row, cut
from gft_lite.recipe.schema import Recipe
from gft_lite.rollout.base import Request, Sampling
from gft_lite.runs.folder import RunFolder
from gft_lite.training.loop import train_step
from gft_lite.training.setup import Place, TrainingRun, setup_run
from gft_lite.utils.distributed import SINGLE_PROCESS

TOKENS = 24


def seconds(functions: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Tokens/s of each function, which returns its number of tokens; the best of several turns."""
    best = dict.fromkeys(functions, 0.0)
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            tokens = function()
            if turn:  # The first turn warms up.
                best[name] = max(best[name], tokens / (time.perf_counter() - start))
    return best


def rollout(run: TrainingRun) -> dict[str, Callable[[], int]]:
    """Our engine and `generate`, both without end tokens, so that the token counts are equal."""
    policy, prompts = run.policy, [p.prompt_ids for p in run.builder.problems[:16]]
    policy.eos_ids = frozenset()
    run.engine.sampler.sync(None, 0)

    def ours() -> int:
        requests = [Request(p, tuple(range(8))) for p in prompts]
        done = run.engine.sampler.generate(requests, Sampling(max_tokens=TOKENS))
        return sum(len(c.token_ids) for group in done for c in group)

    def generate() -> int:
        ids = torch.tensor(prompts)
        policy.model.eval()
        with torch.no_grad(), policy.base():
            out = policy.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                num_return_sequences=8, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
            )  # fmt: skip
        policy.model.train()
        return out[:, ids.shape[1] :].numel()

    return {"ours": ours, "generate": generate}


def training(run: TrainingRun) -> dict[str, Callable[[], int]]:
    """Forward and backward of the GFT loss: response positions in chunks, or full logits."""
    policy = run.policy
    encode = policy.tokenizer.encode
    rows = [
        Row(p.prompt_ids, tuple(encode(text)), (-1.0) ** i)
        for p in run.builder.problems[:32]
        for i, text in enumerate(p.experts + p.teachers)
    ]
    [batch] = cut(rows, 10**9, pad_id=policy.pad_id)
    return {
        "ours": lambda: _backward(policy, batch, policy.token_scores(batch).logprobs),
        "full_logits": lambda: _backward(policy, batch, _full_logits(policy, batch)),
    }


def _full_logits(policy: Policy, batch: MicroBatch) -> Tensor:
    logits = policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logprobs = logits.float().log_softmax(-1)
    return logprobs.flatten(0, 1)[batch.predicts].gather(-1, batch.targets[:, None])[:, 0]


def _backward(policy: Policy, batch: MicroBatch, logprobs: Tensor) -> int:
    gft_loss(LossInputs(logprobs, batch.advantages)).per_token.mean().backward()
    policy.model.zero_grad()
    return logprobs.numel()


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    quiet = Console(quiet=True)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.load("recipes/lab.yaml", ["rollout.engine=transformers"])
        place = Place(RunFolder(Path(folder) / "run"), SINGLE_PROCESS, quiet, stack)
        run = setup_run(recipe, place)
        train_step(run, 1)
        metrics = train_step(run, 2)
        step_seconds = metrics["seconds"]
        figures = {
            "training_tokens_per_s": seconds(training(run), repeats),
            "rollout_tokens_per_s": seconds(rollout(run), repeats),
            "step_seconds": step_seconds,
            "peak_rss_mib": round(peak_rss_mib()),
        }
    for kind, peer in (("training", "full_logits"), ("rollout", "generate")):
        speeds = figures[f"{kind}_tokens_per_s"]
        figures[f"{kind}_ratio"] = speeds["ours"] / speeds[peer]
        print(f"{kind}: {speeds['ours']:,.0f} tokens/s, {figures[f'{kind}_ratio']:.2f}x {peer}")
    print(f"peak RSS: {figures['peak_rss_mib']} MiB")
    print(f"written: {record('step', figures)}")


if __name__ == "__main__":
    main()
