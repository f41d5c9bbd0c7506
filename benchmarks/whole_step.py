"""A whole training step on a CPU, with rollout, grading, training and sync: gft-lite and TRL.

The same step for every side: the same problems as plain text, K responses to each of exactly
so many tokens (end tokens are ignored, so that no side has shorter rows, which spares TRL its
padding), temperature 1, GRPO with the mean over tokens, LoRA of rank 16 on every linear layer, fp32
weights, AdamW. The reward is 1 for an even number of characters, so that groups are
not flat. Each side is a process of its own with one thread; a short step warms it up. Time is the
process's CPU time, and the best of the rounds counts; a reward of gft-lite that runs in a worker
process is not in it, and neither is a start.

- `gft_lite, vllm`: sampled by vLLM in bfloat16, its default beside a policy in fp32 on a CPU.
- `gft_lite, transformers`: sampled with the trainer's own weights.
- `trl`: GRPOTrainer as shipped, sampled by `generate`; its LoRA weights need no sync.

Beside each phase stands its share of the machine's limit. Decoding reads every weight once a step
and multiplies it with every row, at the bandwidth and the matrix rate that two small kernels reach
here in the phase's precision. Training multiplies each weight four times for each position that the
side must forward at least (each prompt once), without recomputation, at the matrix rate in fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.real_model import find_real_model
from benchmarks.record import fresh_processes, record
from benchmarks.recorded import RANK, lora
from benchmarks.rollout_cpu import limit
from gft_lite.planning.model_shape import find_shape
from gft_lite.policy.registry import model_location
from gft_lite.recipe.schema import Recipe
from gft_lite.runs import metrics
from gft_lite.runs.folder import RunFolder
from gft_lite.training.loop import train_step
from gft_lite.training.setup import Place, setup_run
from gft_lite.utils.distributed import SINGLE_PROCESS
from gft_lite.utils.errors import UserError

EVEN = r"(..)*"  # Matches texts with an even number of characters.
WARM_UP_TOKENS = 4
PROBLEM = (
    "A baker sells {0} loaves of bread in the morning and {1} in the afternoon, each for {2} "
    "dollars. On the next day, half as many are sold for one dollar more. How many dollars does "
    "the baker earn on both days together?"
)
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """A step: the number of problems, responses to each, and tokens of each response."""

    problems: int = 2
    members: int = 8
    tokens: int = 64
    steps: int = 1

    @property
    def trained_tokens(self) -> int:
        """Response tokens of a step."""
        return self.problems * self.members * self.tokens

    def texts(self) -> list[str]:
        """The problems."""
        return [PROBLEM.format(20 + 3 * i, 11 + i, 2 + i) for i in range(self.problems)]


# --- gft-lite ----------------------------------------------------------------------------------


def gft_lite(model: str, size: Size, engine: str) -> Figures:
    """CPU-seconds of each phase of our training step."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    metrics.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        data = Path(name) / "problems.jsonl"
        rows = [{"problem": text, "answer": "0"} for text in size.texts()]
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        recipe = our_recipe(model, size, engine, data)
        folder = RunFolder(Path(name) / "run")
        run = setup_run(recipe, Place(folder, SINGLE_PROCESS, Console(quiet=True), stack))
        run.policy.eos_ids = frozenset()
        vars(run.engine.sampler)["_engine"]._end_ids = []  # vLLM's copy of them.
        run.engine.sync(0)
        sampling, phases = run.builder.sampling, []
        for step in range(1 + size.steps):
            length = size.tokens if step else WARM_UP_TOKENS
            run.builder.sampling = replace(sampling, max_tokens=length)
            start = time.process_time()
            found = train_step(run, step + 1)
            whole = time.process_time() - start
            phases.append(_phases(found["seconds"], whole))
        if found["rollout_tokens"] != size.trained_tokens:
            raise RuntimeError("gft-lite: must sample every token, but did not.")
        return {**_best(phases[1:]), "checkpointing": run.policy.settings.gradient_checkpointing}


def our_recipe(model: str, size: Size, engine: str, data: Path) -> Recipe:
    """The step as a recipe."""
    return Recipe.from_tree(
        {
            "method": "grpo",
            "objective": {"reduction": "token_mean"},
            "policy": {"model": model, "device": "cpu", "quantization": "none",
                       "dtype": "float32", "context": 256, "lora": {"rank": RANK}},
            "data": {"source": str(data), "holdout": 0, "shuffle": False},
            "group": {"expert": 0, "teacher": 0, "self": size.members},
            "reward": {"functions": [{"name": "format", "parameters": {"pattern": EVEN}}]},
            "rollout": {"engine": engine, "max_tokens": size.tokens},
            "optim": {"lr": 1e-6, "schedule": "constant", "warmup": 0},
            "train": {"steps": 1 + size.steps, "problems_per_step": size.problems},
            "monitor": {"every": 0, "problems": 1},
            "eval": {"samples": 1, "k": [1]},
        }
    )  # fmt: skip


# --- TRL ---------------------------------------------------------------------------------------


def trl(model: str, size: Size, engine: str = "") -> Figures:
    """CPU-seconds of each phase of TRL's training step, all rows in one micro-batch of 8."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.trl_peer import use_torch_kernels

    transformers.utils.logging.set_verbosity_error()
    use_torch_kernels()
    seconds: dict[str, float] = defaultdict(float)
    phases: list[Figures] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            found = function(*args, **kwargs)
            seconds[name] += time.process_time() - start
            return found

        return call

    def even(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        expected = _length(trainer)
        if any(len(ids) != expected for ids in completion_ids):
            raise RuntimeError(f"trl: must sample {expected} tokens, but did not.")
        return [float(re.fullmatch(EVEN, x, re.DOTALL) is not None) for x in completions]

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _set_length(trainer, size.tokens if state.global_step else WARM_UP_TOKENS)
            seconds.clear()
            self.start = time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            phases.append(_phases(seconds, time.process_time() - self.start))

    rows, folder = size.problems * size.members, model_location(model)
    with tempfile.TemporaryDirectory() as name:
        config = GRPOConfig(
            output_dir=name, per_device_train_batch_size=8, gradient_accumulation_steps=rows // 8,
            num_generations=size.members, max_completion_length=size.tokens,
            max_steps=1 + size.steps, learning_rate=1e-6, lr_scheduler_type="constant",
            bf16=False, use_cpu=True, dataloader_pin_memory=False, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        policy = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts = [{"prompt": text} for text in size.texts()]
        trainer: Any = GRPOTrainer(
            policy, even, config, callbacks=[Watch()], peft_config=lora(),
            train_dataset=Dataset.from_list(prompts),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer._generate = timed("rollout", trainer._generate)
        trainer._calculate_rewards = timed("reward", trainer._calculate_rewards)
        trainer.train()
        return {**_best(phases[1:]), "checkpointing": bool(config.gradient_checkpointing)}


def _set_length(trainer: Any, tokens: int) -> None:
    """Sample exactly so many tokens."""
    trainer.generation_config.update(max_new_tokens=tokens, min_new_tokens=tokens)
    trainer.generation_kwargs |= {"max_new_tokens": tokens, "min_new_tokens": tokens}


def _length(trainer: Any) -> int:
    return trainer.generation_config.max_new_tokens


def _phases(seconds: Figures, whole: float) -> Figures:
    """CPU-seconds by phase; what is neither sampled, graded nor synced is training."""
    found = {name: seconds.get(name, 0.0) for name in ("rollout", "reward", "sync")}
    return {**found, "train": whole - sum(found.values()), "whole": whole}


def _best(phases: list[Figures]) -> Figures:
    return {"cpu_seconds": min(phases, key=lambda each: each["whole"])}


# --- comparison --------------------------------------------------------------------------------

SIDES: dict[str, tuple[Callable[..., Figures], str, torch.dtype]] = {
    "gft_lite, vllm": (gft_lite, "vllm", torch.bfloat16),
    "gft_lite, transformers": (gft_lite, "transformers", torch.float32),
    "trl": (trl, "", torch.float32),
}


def compare(model: str, size: Size, sides: list[str], rounds: int, pool: Executor) -> Figures:
    """Every side in turn, several times, and each phase beside the machine's limit."""
    runs: dict[str, list[Figures]] = {name: [] for name in sides}
    limits: dict[torch.dtype, list[Figures]] = {torch.float32: [], torch.bfloat16: []}
    for turn in range(rounds):
        for name in sides[:: -1 if turn % 2 else 1]:
            function, engine, _ = SIDES[name]
            runs[name].append(pool.submit(function, model, size, engine).result())
            print(f"round {turn + 1}, {name}: {runs[name][-1]}", flush=True)
        rows = size.problems * size.members
        for dtype, found in limits.items():
            found.append(pool.submit(limit, model, rows, dtype).result())
    fastest = {dtype: {key: max(each[key] for each in found) for key in found[0]}
               for dtype, found in limits.items()}  # fmt: skip
    ideal = training_limit(model, size, fastest[torch.float32]["gflops"])
    found = {}
    for name, own in runs.items():
        best = min((run["cpu_seconds"] for run in own), key=lambda each: each["whole"])
        decoding = fastest[SIDES[name][2]]["tokens_per_cpu_second"]
        found[name] = {
            "cpu_seconds": best,
            "checkpointing": own[0]["checkpointing"],
            "all_cpu_seconds": [run["cpu_seconds"]["whole"] for run in own],
            "trained_tokens_per_cpu_second": size.trained_tokens / best["whole"],
            "share_of_limit": {
                "rollout": size.trained_tokens / decoding / best["rollout"],
                "train": ideal / best["train"],
            },
        }
    peer = found.get("trl")
    for figures in found.values() if peer else ():
        figures["speed_ratio"] = {
            phase: peer["cpu_seconds"][phase] / figures["cpu_seconds"][phase]
            for phase in ("rollout", "train", "whole")
        }
    limits_found = {str(dtype).removeprefix("torch."): best for dtype, best in fastest.items()}
    return {"size": asdict(size), "prompt_tokens": prompt_tokens(model, size),
            "limits": limits_found, "sides": found}  # fmt: skip


def prompt_tokens(model: str, size: Size) -> int:
    """Tokens of all prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_location(model))
    return sum(len(ids) for ids in tokenizer(size.texts())["input_ids"])


def training_limit(model: str, size: Size, gflops: float) -> float:
    """CPU-seconds of the products of a step: forward and the gradient of its input."""
    shape = find_shape(model)
    positions = prompt_tokens(model, size) + size.trained_tokens
    products = shape.linear_parameters * positions
    products += shape.embedding_parameters * size.trained_tokens  # The output head.
    return 4 * products / (gflops * 1e9)


def show(figures: Figures) -> None:
    """Print the table."""
    table = Table("side", "rollout", "grading", "training", "sync", "whole", "tokens/CPU-s",
                  "x TRL", "rollout of limit", "training of limit")  # fmt: skip
    for name, side in figures["sides"].items():
        seconds, share = side["cpu_seconds"], side["share_of_limit"]
        table.add_row(
            name,
            *(f"{seconds[key]:.2f}" for key in ("rollout", "reward", "train", "sync", "whole")),
            f"{side['trained_tokens_per_cpu_second']:.0f}",
            f"{side['speed_ratio']['whole']:.1f}" if "speed_ratio" in side else "",
            *(f"{share[phase]:.0%}" for phase in ("rollout", "train")),
        )
    Console(width=130).print(table)


def main() -> None:
    """Measure, print and record; says why where it can't."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a folder; by default that of real_model.py")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    arguments = parser.parse_args()
    sides = list(arguments.sides)
    if importlib.util.find_spec("vllm") is None and "gft_lite, vllm" in sides:
        print("vllm is not installed: without it")
        sides.remove("gft_lite, vllm")
    try:
        model = arguments.model or str(find_real_model())
    except UserError as error:
        return print(f"skipped: {error}")
    with fresh_processes() as pool:
        figures = compare(model, Size(tokens=arguments.tokens), sides, arguments.rounds, pool)
    show(figures)
    print(f"written: {record('whole_step', figures)}")


if __name__ == "__main__":
    main()
