"""TRL's GRPO and ours on one recorded batch: the cost of an optimiser step, memory, gradient.

Every side runs the same step on the same responses from the same weights (fp32, nothing
quantised, LoRA of rank 16 on every linear layer, AdamW), in a process of its own with one torch
thread. CPU-seconds are the process's; the best of the rounds counts, and rounds alternate the
order. Trained tokens are all response tokens of the batch, those of flat groups too: all sides
run the same step.

- `trl`: as shipped, on its code path with vLLM (see `trl_peer.py`).
- `trl_tuned`: without importance-sampling correction, hence without the old policy's log-probs,
  and two rows a micro-batch in place of 8.
- `trl_by_group`: tuned, and one prompt a rollout, so that it pads to the longest of a group; its
  loss then averages over groups, and vLLM would sample one prompt at a time.
- `gft_lite`, and without the gradient checkpointing that TRL's defaults have on; and in
  micro-batches of as many tokens as `trl_tuned` has, to compare memory.

TRL's work does not depend on the rewards: its runs with flat groups are used for both cases.
The law next to a ratio is its value if time were proportional to forwarded positions.

With `--model FOLDER`, or `--model smollm2` (`real_model.py`), the weights are those of a real one,
and the lengths those of answers to GSM8K (mean 80, p95 200 tokens, prompt of 90) or, with
`--lengths reasoning`, of long reasoning (300, 900), two groups of 8 or as many as `--groups`.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import trl_peer
from benchmarks.real_model import find_model
from benchmarks.record import PeakMemory, fresh_processes, record
from benchmarks.recorded import (
    RANK,
    Clock,
    Forwarded,
    Shape,
    advantages,
    against_reference,
    gradient,
    make_groups,
    make_model,
    make_reference,
    read_groups,
    warm_up,
)
from gft_lite.objective.reduction import token_weights
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.training.learner import Learner
from gft_lite.utils.errors import UserError

PROMPTS = (150, 1024)
REAL_PROMPT = 90
# Of two groups of 8, by the name of `--lengths`: mean and 95% quantile in tokens.
LENGTHS = {"gsm8k": (80.0, 200.0), "reasoning": (300.0, 900.0)}
MICRO_BATCH_TOKENS = 4096
SMALL = "rows of trl_tuned"  # In place of so many tokens.
Figures = dict[str, Any]


def replay(
    folder: Path, prompt: int, flat: str, options: Figures, steps: int, clock: Clock | None = None
) -> Figures:
    """Run `steps` of our optimiser steps on the recorded batch and measure each."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    groups, limit = read_groups(folder, prompt, flat), MICRO_BATCH_TOKENS
    if options.get("micro_batch") == SMALL:
        longest = max(len(response) for group in groups for response in group["responses"])
        limit = trl_peer.TUNED["per_device_train_batch_size"] * (prompt + longest)
    settings = {name: value for name, value in options.items() if name != "micro_batch"}
    recipe = Recipe.from_tree(
        {
            "method": "grpo",
            "objective": {"reduction": "token_mean"},  # TRL's default
            "policy": {"model": str(folder), "adapter": str(folder / "adapter"),
                       "quantization": "none", "lora": {"rank": RANK}, **settings},
            "optim": {"lr": 1e-30, "schedule": "constant", "warmup": 0, "clip_norm": 1e9},
            "train": {"micro_batch_tokens": limit},
        }
    )  # fmt: skip
    policy = load_policy(recipe.policy)
    policy.model.train()
    learner, forwarded = Learner(policy, recipe), Forwarded(policy.model)
    gradients: list[torch.Tensor] = []
    learner.optimizer.register_step_pre_hook(lambda *_: gradients.append(gradient(policy.model)))
    clock, peak = clock or Clock(), PeakMemory()
    for some in [warm_up(groups), *[groups] * steps]:
        forwarded.reset()
        clock.start(policy.model)
        learner.update(learner.prepare_rows(rows(recipe, some)), progress=0.5)
        clock.stop()
    return {
        "cpu_seconds": min(clock.seconds[1:]),
        "peak_mib": peak.read(),
        "forwarded": forwarded.counts,
        "gradient": against_reference(gradients[-1], folder, prompt, flat),
    }


def rows(recipe: Recipe, groups: list[Figures]) -> list[Row]:
    """The recorded responses as rows, with our advantages and weights."""
    chosen = [
        (tuple(group["prompt_ids"]), tuple(response), advantage)
        for group, own in zip(groups, advantages(groups), strict=True)
        for response, advantage in zip(group["responses"], own, strict=True)
    ]
    weights = token_weights([len(ids) for _, ids, _ in chosen], recipe.objective.reduction)
    return [Row(*row, weight) for row, weight in zip(chosen, weights, strict=True)]


@dataclass(frozen=True)
class Side:
    """A function that replays the batch, its options and cases (percent of flat groups).

    `passes` per position: old log-probs, forward, recomputation, backward.
    """

    replay: Callable[..., Figures]
    options: Figures
    flat: tuple[str, ...]
    passes: int


SIDES = {
    "trl": Side(trl_peer.replay, trl_peer.SHIPPED, ("40",), 4),
    "trl_tuned": Side(trl_peer.replay, trl_peer.TUNED, ("40",), 3),
    "trl_by_group": Side(trl_peer.replay, trl_peer.BY_GROUP, ("40",), 3),
    "gft_lite": Side(replay, {"gradient_checkpointing": True}, ("0", "40"), 3),
    "gft_lite_no_checkpointing": Side(replay, {"gradient_checkpointing": False}, ("0", "40"), 2),
    "gft_lite_small_batches": Side(replay, {"micro_batch": SMALL}, ("0", "40"), 3),
}


def compare(shape: Shape, prompts: Sequence[int], rounds: int, pool: Executor) -> list[Figures]:
    """Every side on every case."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, shape)
        for prompt in prompts:
            make_groups(folder, shape, prompt)
        list(pool.map(make_reference, [folder] * len(prompts), prompts))
        jobs: list[tuple[tuple[int, str, str], Future[Figures]]] = []
        for turn in range(rounds):
            for prompt in prompts:
                for label, flats in list(flat_cases(shape).items())[:: -1 if turn % 2 else 1]:
                    side = SIDES[label]
                    for flat in flats:
                        job = pool.submit(side.replay, folder, prompt, flat, side.options, 1)
                        jobs.append(((prompt, flat, label), job))
        runs: dict[tuple[int, str, str], list[Figures]] = {}
        for key, job in jobs:
            runs.setdefault(key, []).append(job.result())
        shares = {(prompt, flat): _flat_share(folder, prompt, flat)
                  for prompt in prompts for flat in flat_cases(shape)["gft_lite"]}  # fmt: skip
    tokens = sum(shape.lengths())
    return [
        {"prompt": prompt, "flat_percent": int(flat), "flat_token_share": share,
         "sides": _case(runs, prompt, flat, tokens)}
        for (prompt, flat), share in shares.items()
    ]  # fmt: skip


def flat_cases(shape: Shape) -> dict[str, tuple[str, ...]]:
    """The cases that each side runs; a single group is not flat, and pads alone anyway."""
    if shape.groups > 1:
        return {label: side.flat for label, side in SIDES.items()}
    return {label: ("0",) for label in SIDES if label != "trl_by_group"}


def _flat_share(folder: Path, prompt: int, flat: str) -> float:
    """The share of the response tokens that belong to groups of equal rewards."""
    groups = read_groups(folder, prompt, flat)
    sizes = [sum(map(len, group["responses"])) for group in groups]
    equal = [len(set(group["rewards"])) == 1 for group in groups]
    return sum(size for size, is_flat in zip(sizes, equal, strict=True) if is_flat) / sum(sizes)


def _case(runs: dict[Any, list[Figures]], prompt: int, flat: str, tokens: int) -> Figures:
    """The figures of all sides on one case, with ratios to TRL as shipped."""
    found = {}
    for label, side in SIDES.items():
        # TRL's work is the same whatever is flat.
        own = runs.get((prompt, flat, label)) or runs.get((prompt, side.flat[0], label))
        if own is None:
            continue
        seconds = min(run["cpu_seconds"] for run in own)
        forwarded = own[0]["forwarded"]
        found[label] = {
            "cpu_seconds": seconds,
            "all_cpu_seconds": [run["cpu_seconds"] for run in own],
            "trained_tokens_per_cpu_second": tokens / seconds,
            "peak_mib": min(run["peak_mib"] for run in own),
            "forwarded_per_trained": forwarded["with_gradient"] / tokens,
            "old_logprobs_per_trained": forwarded["without_gradient"] / tokens,
            "gradient": own[0]["gradient"],
            "passes": side.passes * forwarded["with_gradient"],
        }
    peer = found["trl"]
    for figures in found.values():
        figures["speed_ratio"] = peer["cpu_seconds"] / figures["cpu_seconds"]
        figures["speed_ratio_law"] = peer["passes"] / figures["passes"]
        figures["peak_ratio"] = peer["peak_mib"] / max(figures["peak_mib"], 1)  # else noise
    return found


def show(cases: list[Figures]) -> None:
    """Print the table."""
    table = Table("prompt", "flat", "side", "forwarded per trained", "tokens/CPU-s", "x TRL", "law",
                  "peak MiB", "x less", "cosine")  # fmt: skip
    for case in cases:
        for label, side in case["sides"].items():
            old = side["old_logprobs_per_trained"]
            table.add_row(
                str(case["prompt"]),
                f"{case['flat_token_share']:.0%}",
                label,
                f"{side['forwarded_per_trained']:.2f}" + (f" + {old:.2f}" if old else ""),
                f"{side['trained_tokens_per_cpu_second']:.0f}",
                f"{side['speed_ratio']:.1f}",
                f"{side['speed_ratio_law']:.1f}",
                f"{side['peak_mib']:.0f}",
                f"{side['peak_ratio']:.1f}",
                f"{side['gradient']['cosine']:.7f}",
            )
        table.add_section()
    Console(width=120).print(table)


def real_shape(model: str, lengths: str, groups: int = 2) -> Shape:
    """Groups of 8 for a real model. Raises: UserError."""
    folder = find_model(model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    mean, p95 = LENGTHS[lengths]
    return Shape(vocab=config["vocab_size"], groups=groups, mean=mean, p95=p95, model=str(folder))


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model", default="random", help="random, smollm2 or a folder")
    parser.add_argument("--lengths", choices=LENGTHS, default="gsm8k", help="of a real model")
    parser.add_argument("--groups", type=int, default=2, help="of 8, for a real model")
    asked = parser.parse_args()
    shape, prompts, name = Shape(), PROMPTS, "against_trl"
    if asked.model != "random":
        try:
            shape = real_shape(asked.model, asked.lengths, asked.groups)
        except UserError as error:
            print(f"skipped: {error}")
            return
        prompts, name = (REAL_PROMPT,), f"{name}_{Path(shape.model).name}_{asked.lengths}"
        if asked.groups != parser.get_default("groups"):
            name += f"_{asked.groups}_groups"
    with fresh_processes() as pool:
        cases = compare(shape, prompts, asked.rounds, pool)
    show(cases)
    figures = {
        "shape": asdict(shape) | {"model": Path(shape.model).name},
        "lengths": shape.lengths(),
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "rounds": asked.rounds,
        "cases": cases,
    }
    print(f"written: {record(name, figures)}")


if __name__ == "__main__":
    main()
