"""TRL's GRPOTrainer and ours on one batch and one NF4 model: seconds, memory, gradient.

`trl_peer.py` says what the recording takes the place of in TRL; here it trains the same random
1.5B model in NF4, in bf16 on CUDA, with its own Triton kernels. Ours takes GRPO's step, whose loss
is TRL's.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
import warnings
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from benchmarks import trl_peer
from benchmarks.against_trl import rows
from benchmarks.gpu_check.meter import Peak
from benchmarks.gpu_check.parts import Figures, Notes, Skip
from benchmarks.gpu_check.scale import SMALL, Setup
from benchmarks.gpu_check.work import compared, free, held, make_groups, random_policy, timed
from benchmarks.recorded import Group, gradient
from gft_lite.policy.batching import Row
from gft_lite.policy.lora import LoraPolicy
from gft_lite.policy.registry import model_location
from gft_lite.training.learner import Learner

SIDES = {"trl": trl_peer.SHIPPED, "trl_tuned": trl_peer.TUNED}


def check(setup: Setup, notes: Notes) -> None:
    """Note both sides and how many times as fast and as small ours is."""
    if importlib.util.find_spec("trl") is None:
        raise Skip("trl is not installed")
    groups = make_groups(setup, setup.shape(SMALL).vocabulary)
    gradients: dict[str, Tensor] = {}
    own = notes.case("gft_lite", ours, setup, groups, gradients)
    free()
    if own is None:
        return
    for name, options in SIDES.items():
        found = notes.case(name, theirs, setup, groups, options, gradients)
        free()
        if found:
            ratios = {key: found[key] / own[key] for key in ("seconds", "peak_gib")}
            notes.add(f"{name} to ours", ratios | compared(gradients["trl"], gradients["ours"]))


def ours(setup: Setup, groups: list[Group], gradients: dict[str, Tensor]) -> Figures:
    """Our GRPO step."""
    recipe = setup.recipe(SMALL, objective={"reduction": "token_mean"})
    recipe = recipe.model_copy(update={"method": "grpo"})
    policy = random_policy(setup, recipe.policy)
    learner, budget = Learner(policy, recipe), setup.sizes.micro_batch
    learner.micro_batch_tokens = budget
    learner.optimizer.register_step_pre_hook(
        lambda *_: gradients.__setitem__("ours", gradient(policy.model).cpu())
    )
    every = rows(recipe, groups)
    _record(policy, every, groups, budget)
    kept = learner.prepare_rows(every)
    learner.update(kept[:2], progress=0.5)
    with Peak(setup.device, held(policy)) as peak:
        _, seconds = timed(setup, lambda: learner.update(kept, progress=0.5))
    return {"seconds": seconds, "peak_gib": peak.gib}


@torch.no_grad()
def _record(policy: LoraPolicy, every: list[Row], groups: list[Group], budget: int) -> None:
    """Write down what the model gives each token, as the engine that sampled it would."""
    found: dict[int, list[float]] = {}
    for batch in policy.batches(every, budget):
        logprobs = policy.token_scores(batch).logprobs.cpu()
        for i in batch.row.unique().tolist():
            found[i] = logprobs[batch.row == i].tolist()
    members = len(groups[0]["responses"])
    for number, group in enumerate(groups):
        group["logprobs"] = [found[number * members + member] for member in range(members)]


def theirs(
    setup: Setup, groups: list[Group], options: dict[str, Any], gradients: dict[str, Tensor]
) -> Figures:
    """TRL's steps on the same groups; the first one, on shortened rows, warms up."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.simplefilter("ignore")
    import transformers
    import trl
    from datasets import Dataset

    transformers.utils.logging.set_verbosity_error()
    on_cpu = setup.device == "cpu"
    if on_cpu:
        trl_peer.use_torch_kernels()
    model = _plain_model(setup)

    class Watch(transformers.TrainerCallback):
        """Times whole steps, and keeps the gradient of the last."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            _synchronise()
            self._start = time.perf_counter()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            gradients["trl"] = gradient(model).float().cpu()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            _synchronise()
            self.seconds.append(time.perf_counter() - self._start)

    watch, members = Watch(), len(groups[0]["responses"])
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, max_steps=2, num_generations=members,
            gradient_accumulation_steps=len(groups) * members
            // options["per_device_train_batch_size"],
            learning_rate=1e-30, max_grad_norm=0.0, bf16=not on_cpu, use_cpu=on_cpu,
            dataloader_pin_memory=False, report_to="none", save_strategy="no",
            disable_tqdm=True, logging_strategy="no", **options,
        )  # fmt: skip
        trainer: Any = trl.GRPOTrainer(
            model, trl_peer._reward(groups), config, callbacks=[watch],
            processing_class=transformers.AutoTokenizer.from_pretrained(model_location("lab")),
            rollout_func=trl_peer._rollout(groups),
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(groups))]),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.use_vllm = True
        trainer.vllm_generation, trainer._last_loaded_step = trl_peer._NoEngine(), -1
        with Peak(setup.device, [*model.parameters(), *model.buffers()]) as peak:
            trainer.train()
    return {"seconds": watch.seconds[-1], "peak_gib": peak.gib}


def _plain_model(setup: Setup) -> Any:
    """The random model without what our policy changed in it."""
    model = random_policy(setup, setup.recipe(SMALL).policy).model
    base: Any = model.get_base_model()
    base.set_attn_implementation("sdpa")
    base.gradient_checkpointing_disable()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = True
    return model


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
