"""TRL's side of `against_trl.py`: its GRPOTrainer takes steps on the recorded groups.

Everything is TRL's own code, called by `train()`, except for three parts that a CPU needs or that
the recording replaces:

- Responses and their log-probs come from the recording, by TRL's `rollout_func`.
- `use_vllm` is set after the trainer is made, so that it takes the code path it has with vLLM
  (log-probs of the old policy, importance-sampling correction) although no engine is started. The
  weight sync before a rollout is left out; `sync.py` measures it.
- TRL's log-prob kernel multiplies tiles with torch and folds each into running sums with Triton,
  which has no CPU backend: those two element-wise kernels are replaced by the same arithmetic in
  torch, a few rows at a time so that they need no memory of their own. Tiles, their sizes and
  the order of the work stay TRL's.

The padding, micro-batches, masks, checkpointing and the optimiser are as TRL has them.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import PeakMemory
from benchmarks.recorded import (
    Clock,
    Forwarded,
    against_reference,
    gradient,
    plain_model,
    read_groups,
    warm_up,
)

# Beside what the comparison itself fixes, only TRL's defaults; 8 rows a micro-batch is one.
SHIPPED: dict[str, Any] = {"per_device_train_batch_size": 8}
# Two rows are as fast as 8 and take a third of the memory.
TUNED = {"per_device_train_batch_size": 2, "vllm_importance_sampling_correction": False}
# Four micro-batches a rollout: pads to each group's longest response, but then vLLM is given one
# prompt at a time.
BY_GROUP = TUNED | {"steps_per_generation": 4}
ROWS = 64  # that the torch kernels take at a time


def replay(
    folder: Path, prompt: int, flat: str, options: dict[str, Any], steps: int,
    clock: Clock | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run `steps` optimiser steps on the recorded batch and measure each."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import transformers
    import trl
    from datasets import Dataset

    transformers.utils.logging.set_verbosity_error()
    groups = read_groups(folder, prompt, flat)
    rows = sum(len(group["responses"]) for group in groups)
    use_torch_kernels()

    class Watched(trl.GRPOTrainer):
        """Records the rows of each micro-batch."""

        def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
            lines = zip(inputs["completion_ids"], inputs["completion_mask"].bool(), strict=True)
            watch.rows.update(tuple(ids[mask].tolist()) for ids, mask in lines)
            return super()._compute_loss(model, inputs)

    class Watch(transformers.TrainerCallback):
        """Measures whole steps; the first one, on shortened rows, is a warm-up."""

        def __init__(self) -> None:
            self.rows: Counter[tuple[int, ...]] = Counter()
            self.gradient = torch.empty(0)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.rows.clear()
            forwarded.reset()
            clock.start(trainer.model)

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.gradient = gradient(model)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.stop()

    clock, watch, model = clock or Clock(), Watch(), plain_model(folder)
    forwarded, peak = Forwarded(model), PeakMemory()
    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        gradient_accumulation_steps=rows // options["per_device_train_batch_size"],
        num_generations=len(groups[0]["responses"]),
        max_steps=1 + steps, learning_rate=1e-30, max_grad_norm=0.0,
        bf16=False, use_cpu=True, dataloader_pin_memory=False,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        **options,
    )  # fmt: skip
    trainer: Any = Watched(
        model, _reward(groups), config, callbacks=[watch], processing_class=_tokenizer(folder),
        rollout_func=_rollout(groups), train_dataset=Dataset.from_list(
            [{"prompt": str(number)} for number in range(len(groups))]),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.use_vllm = True
    trainer.vllm_generation, trainer._last_loaded_step = _NoEngine(), -1
    trainer.train()
    recorded = Counter(tuple(response) for group in groups for response in group["responses"])
    if watch.rows != recorded:
        raise RuntimeError("trl: must train on exactly the recorded responses, but did not.")
    return {
        "cpu_seconds": min(clock.seconds[1:]),
        "peak_mib": peak.read(),
        "forwarded": forwarded.counts,
        "gradient": against_reference(watch.gradient, folder, prompt, flat),
    }


def _rollout(groups: list[dict[str, Any]]) -> Any:
    """The recorded responses of each prompt in turn; TRL requests K of them in a row."""
    left: dict[str, Any] = {}

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        some = warm_up(groups) if trainer.state.global_step == 0 else groups
        found: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for prompt in prompts:
            group = some[int(prompt)]
            place = left.setdefault(prompt, itertools.cycle(range(len(group["responses"]))))
            member = next(place)
            found["prompt_ids"].append(group["prompt_ids"])
            found["completion_ids"].append(group["responses"][member])
            found["logprobs"].append(group["logprobs"][member])
        return found

    return rollout


def _reward(groups: list[dict[str, Any]]) -> Any:
    reward_of = {
        tuple(response): reward
        for group in groups
        for response, reward in zip(group["responses"], group["rewards"], strict=True)
    }

    def recorded(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [reward_of.get(tuple(ids), 0.0) for ids in completion_ids]

    return recorded


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class _NoEngine:
    def sync_weights(self) -> None:
        """The recording needs no engine."""


# --- the two Triton kernels in torch ---------------------------------------------------------


def use_torch_kernels() -> None:
    from trl.kernels import chunked_logprob

    chunked_logprob._forward_kernel = _Launch(_fold_tile)
    chunked_logprob._backward_kernel = _Launch(_differentiate_tile)


class _Launch:
    """A function where Triton's `kernel[grid](...)` stood."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._function


def _fold_tile(
    tile: Tensor, stride: int, targets: Tensor, maximum: Tensor, sum_exp: Tensor,
    logit_sum_exp: Tensor, *rest: Any, HAS_ENTROPY: bool, HAS_SOFTCAP: bool, logit_scale: float,
    inv_t: float, **flags: Any,
) -> None:  # fmt: skip
    """Fold the logits [n, columns] of some words into the running sums of each token."""
    *_, target_logit, start, columns = rest
    _only_plain(HAS_SOFTCAP, logit_scale, inv_t)
    for rows in torch.arange(len(tile)).split(ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        z = tile[part]
        new = torch.maximum(maximum[part], z.amax(1))
        rescale = (maximum[part] - new).exp()
        e = (z - new[:, None]).exp_()
        sum_exp[part] = sum_exp[part] * rescale + e.sum(1)
        if HAS_ENTROPY:
            logit_sum_exp[part] = logit_sum_exp[part] * rescale + e.mul_(z).sum(1)
        maximum[part] = new
    local = targets - start
    here = (local >= 0) & (local < columns)
    target_logit[here] = tile[here, local[here]]


def _differentiate_tile(
    tile: Tensor, stride: int, targets: Tensor, log_z: Tensor, entropy: Tensor,
    grad_logprobs: Tensor, grad_entropy: Tensor, start: int, columns: int, *, HAS_SOFTCAP: bool,
    HAS_LOGPROB_GRAD: bool, HAS_ENTROPY_GRAD: bool, logit_scale: float, inv_t: float,
    **flags: Any,
) -> None:  # fmt: skip
    """Turn logits [n, columns] into the gradient with respect to them, in place."""
    _only_plain(HAS_SOFTCAP or HAS_ENTROPY_GRAD or not HAS_LOGPROB_GRAD, logit_scale, inv_t)
    for rows in torch.arange(len(tile)).split(ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        tile[part].sub_(log_z[part, None]).exp_().mul_(-grad_logprobs[part, None])
    local = targets - start
    here = ((local >= 0) & (local < columns)).nonzero()[:, 0]
    tile[here, local[here]] += grad_logprobs[here]


def _only_plain(other: bool, logit_scale: float, inv_t: float) -> None:
    if other or logit_scale != 1 or inv_t != 1:
        raise NotImplementedError("trl: only plain log-probs at temperature 1 are stood in for.")
