"""The cost of serving the new policy in vLLM: our hot-load and merge-and-push of all weights.

- `hot_load` is `PolicyEngine.sync_unchecked` with a real vLLM engine in the trainer's process:
  write the adapter, load it in the engine, remove the old one.
- `merge_and_push` is TRL's `VLLMGeneration.sync_weights`: merge the adapter, copy every weight,
  unmerge. Each weight is copied once, the minimum for vLLM's `load_weights`; vLLM itself is left
  out, because on a CPU it repacks weights at start and accepts no others later.

Everything runs on a CPU in fp32, so that no transfer to a device is included.

Bytes are those of the adapter file and of the copied weights. For real models they are computed
from the shapes, with weights and adapter in bf16, as for an engine in bf16. The last table shows
what a merge into NF4 keeps of an update: the cosine of applied and intended change, by its size.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

from benchmarks.record import fresh_processes, record
from benchmarks.recorded import Shape, lora, make_model, plain_model
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout.policy_engine import PolicyEngine
from gft_lite.rollout.vllm_engine import VllmEngine
from gft_lite.utils.paths import PACKAGE

# 79M parameters: the width of a real small model, fewer layers.
SHAPE = Shape(hidden=1024, layers=4, ffn=2816, vocab=32768)
SHAPES = ("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B", "meta-llama/Llama-3.1-8B")
CONTEXT = 256
UPDATES = (0.001, 0.01, 0.03, 0.1)  # |change| / |weight|
Figures = dict[str, Any]


def hot_load(folder: Path, turns: int) -> Figures:
    """Our sync of a changed adapter into one engine, several times."""
    _quiet()
    policy = load_policy(
        PolicySettings(model=str(folder), adapter=str(folder / "adapter"), quantization="none",
                       context=CONTEXT)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        engine = VllmEngine(RolloutSettings(engine="vllm", dtype="float32"), policy, Path(name))
        served = PolicyEngine(engine, policy, Path(name) / "v")
        versions = iter(range(1 + turns))
        found = _timed(lambda: served.sync_unchecked(next(versions)), turns)
        [file] = (Path(name) / "v").glob("*/adapter_model.safetensors")
        engine.close()
        return {**found, "bytes": file.stat().st_size}


def merge_and_push(folder: Path, turns: int) -> Figures:
    """TRL's loop over all merged weights, each copied to another tensor."""
    _quiet()
    from accelerate import Accelerator
    from trl.distributed import DistributedBackend
    from trl.generation.vllm_generation import VLLMGeneration

    # Only the sender: TRL supports other versions of vLLM, and only on a GPU.
    sender: Any = VLLMGeneration.__new__(VLLMGeneration)
    sender.model = plain_model(folder)
    sender._dist = DistributedBackend(Accelerator(cpu=True))
    held = {name: weight.clone() for name, weight in sender._iter_named_params()}

    def push() -> None:
        for name, weight in sender._iter_named_params():
            held[name].copy_(weight)

    return {**_timed(push, turns), "bytes": sum(w.nbytes for w in held.values())}


def _timed(function: Callable[[], None], turns: int) -> Figures:
    """The lowest wall-clock and CPU seconds after one warm-up turn."""
    clock, cpu = [], []
    for _ in range(1 + turns):
        started, used = time.perf_counter(), time.process_time()
        function()
        clock.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return {"seconds": min(clock[1:]), "cpu_seconds": min(cpu[1:])}


def merge_fidelity(folder: Path) -> list[Figures]:
    """What a merge into an NF4 weight keeps of an update, and of the weight after an unmerge."""
    _quiet()
    policy = load_policy(PolicySettings(model=str(folder), adapter=str(folder / "adapter")))
    module = policy.model.get_base_model().model.layers[0].mlp.down_proj
    untouched, before, found = module.base_layer.weight, _weight(module), []
    for size in UPDATES:
        scale = size * before.norm() / module.get_delta_weight("default").norm()
        module.lora_B["default"].weight.data *= scale
        wanted = module.get_delta_weight("default").float()
        module.merge()
        applied = _weight(module) - before
        module.unmerge()
        drift = _weight(module) - before
        module.base_layer.weight = untouched
        found.append(
            {
                "relative_update": size,
                "cosine": torch.cosine_similarity(applied.flatten(), wanted.flatten(), 0).item(),
                "relative_drift_after_unmerge": (drift.norm() / before.norm()).item(),
            }
        )
    return found


def _weight(module: Any) -> torch.Tensor:
    weight = module.base_layer.weight
    return dequantize_4bit(weight.data, weight.quant_state).float()


def counted(name: str) -> Figures:
    """Bytes of the adapter and of all weights of a real model, computed from its shape."""
    file = PACKAGE.parent / "configs" / "models" / "shapes" / f"{name}.json"
    config = transformers.AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8")))
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config)
        weights = 2 * sum(parameter.numel() for parameter in base.parameters())
        model = get_peft_model(base, lora())
    adapter = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"model": name, "hot_load_bytes": adapter, "merge_and_push_bytes": weights,
            "ratio": weights / adapter}  # fmt: skip


def compare(shape: Shape, turns: int, pool: Executor) -> Figures:
    """Both syncs, and the merge into NF4, of one random model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, shape)
        ours, peer = (pool.submit(f, folder, turns) for f in (hot_load, merge_and_push))
        fidelity = pool.submit(merge_fidelity, folder)
        found = {"hot_load": ours.result(), "merge_and_push": peer.result()}
        ratios = {f"{key}_ratio": value / found["hot_load"][key]
                  for key, value in found["merge_and_push"].items()}  # fmt: skip
        return {**found, **ratios, "nf4_merge": fidelity.result()}


def _quiet() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    with fresh_processes() as pool:
        measured = compare(SHAPE, turns, pool)
    table = Table("sync", "MB", "seconds", "CPU-seconds")
    for name in ("hot_load", "merge_and_push"):
        row = measured[name]
        table.add_row(
            name, f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.3f}", f"{row['cpu_seconds']:.3f}"
        )
    Console().print(table)
    real = [counted(name) for name in SHAPES]
    for row in real:
        print(f"{row['model']}: {row['hot_load_bytes'] / 1e6:.0f} MB against "
              f"{row['merge_and_push_bytes'] / 1e6:,.0f} MB, {row['ratio']:.0f}x")  # fmt: skip
    for row in measured["nf4_merge"]:
        print(f"update of {row['relative_update']:.1%} merged into NF4: cosine {row['cosine']:.2f}")
    print(f"written: {record('sync', {'shape': asdict(SHAPE), **measured, 'counted': real})}")


if __name__ == "__main__":
    main()
