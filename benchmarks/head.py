"""The output head alone: log-probs and entropy of each token, and the gradient of a GFT-like loss.

`fused` and `chunked` are ours (`policy.fused_head` on and off), `full` is log_softmax over all
logits at once, `trl` is TRL's kernel with its Triton parts in torch (see `trl_peer.py`). Each in
a fresh process with one thread; CPU-seconds are the lowest of several turns, the peak is the growth
of the process.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from numpy.linalg import norm
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.record import PeakMemory, fresh_processes, record
from benchmarks.recorded import Shape, make_model
from benchmarks.trl_peer import use_torch_kernels
from gft_lite.policy.base import TokenScores
from gft_lite.policy.lora import LoraPolicy
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings

HIDDEN = 256
SIZES = {151_936: 384, 1000: 8192}  # vocabulary: tokens
HEADS = ("fused", "chunked", "full", "trl")
Head = Callable[[LoraPolicy, Tensor, Tensor, Tensor], tuple[float, Tensor]]


def fused(policy: LoraPolicy, hidden: Tensor, targets: Tensor, weights: Tensor) -> Any:
    """Loss and gradient in one pass over chunks."""

    def loss(scores: TokenScores, span: slice) -> Tensor:
        return (weights[span] * scores.logprobs).sum()

    return policy.head.loss_gradient(hidden, targets, loss)[:2]


def chunked(policy: LoraPolicy, hidden: Tensor, targets: Tensor, weights: Tensor) -> Any:
    """Chunks that the backward pass recomputes."""
    return _backward(policy.head.scores(hidden.requires_grad_(), targets).logprobs, hidden, weights)


def full(policy: LoraPolicy, hidden: Tensor, targets: Tensor, weights: Tensor) -> Any:
    """All logits at once."""
    logits = policy.head.module(hidden.requires_grad_()).log_softmax(-1)
    with torch.no_grad():
        (logits.exp() * logits).sum(-1)
    return _backward(logits.gather(-1, targets[:, None])[:, 0], hidden, weights)


def trl(policy: LoraPolicy, hidden: Tensor, targets: Tensor, weights: Tensor) -> Any:
    """TRL's kernel, called as its fused head calls it."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

    given = (
        policy.head.module.weight,
        None,
        targets,
        1.0,
        WIDTH,
        None,
        1.0,
        ("log_probs", "entropy"),
    )
    logprobs, *_ = ChunkedLogProbFunction.apply(hidden.requires_grad_(), *given)
    return _backward(logprobs, hidden, weights)


def _backward(logprobs: Tensor, hidden: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    loss = (weights * logprobs).sum()
    [gradient] = torch.autograd.grad(loss, hidden)
    return loss.item(), gradient


def measure(name: str, folder: Path, tokens: int, turns: int) -> tuple[dict[str, float], Any]:
    """CPU-seconds, peak MiB and the gradient of one head."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    policy: Any = load_policy(PolicySettings(model=str(folder), quantization="none"))
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, policy.config.hidden_size, generator=draw)
    targets = torch.randint(policy.config.vocab_size, (tokens,), generator=draw)
    weights = torch.randn(tokens, generator=draw) / tokens
    head: Head = {"fused": fused, "chunked": chunked, "full": full, "trl": trl}[name]
    if name == "trl":
        use_torch_kernels()
    head(policy, hidden[:8].clone(), targets[:8], weights[:8])
    peak, seconds = PeakMemory(), []
    for _ in range(turns):
        start = time.process_time()
        _, gradient = head(policy, hidden.detach(), targets, weights)
        seconds.append(time.process_time() - start)
    return {"cpu_seconds": min(seconds), "peak_mib": peak.read()}, gradient.numpy()


def compare(sizes: dict[int, int], hidden: int, turns: int, pool: Executor) -> list[dict[str, Any]]:
    """Every head at every vocabulary, with its gradient's distance to that of full logits."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        jobs = []
        for vocab, tokens in sizes.items():
            folder = Path(name) / str(vocab)
            folder.mkdir()
            make_model(folder, Shape(hidden=hidden, layers=1, ffn=hidden, vocab=vocab))
            some = {head: pool.submit(measure, head, folder, tokens, turns) for head in HEADS}
            jobs.append((vocab, tokens, some))
        for vocab, tokens, some in jobs:
            results = {head: job.result() for head, job in some.items()}
            exact = results["full"][1]
            for figures, gradient in results.values():
                figures["relative_gap"] = float(norm(gradient - exact) / norm(exact))
            heads = {head: figures for head, (figures, _) in results.items()}
            found.append({"vocabulary": vocab, "tokens": tokens, "heads": heads})
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    with fresh_processes() as pool:
        found = compare(SIZES, HIDDEN, turns, pool)
    table = Table("vocabulary", "tokens", "head", "CPU-s", "peak MiB", "gap of gradient")
    for size in found:
        for head, figures in size["heads"].items():
            table.add_row(
                str(size["vocabulary"]),
                str(size["tokens"]),
                head,
                f"{figures['cpu_seconds']:.2f}",
                f"{figures['peak_mib']:.0f}",
                f"{figures['relative_gap']:.0e}",
            )
    Console().print(table)
    print(f"written: {record('head', {'hidden': HIDDEN, 'sizes': found})}")


if __name__ == "__main__":
    main()
