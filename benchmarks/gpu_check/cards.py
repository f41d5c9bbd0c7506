"""What fits on a smaller card: the plan's largest micro-batch under a limit on torch's memory.

The limit excludes what the plan counts besides torch: the context, and an engine that keeps its
memory while the trainer trains. If nothing fits by the plan, the smallest setting is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import yaml

from benchmarks.gpu_check.meter import Peak
from benchmarks.gpu_check.parts import Figures, Notes
from benchmarks.gpu_check.scale import MODELS, Setup
from benchmarks.gpu_check.work import free, held, random_policy
from gft_lite.planning.memory import MemoryModel
from gft_lite.planning.planner import Plan, choose
from gft_lite.policy.batching import Row
from gft_lite.training.learner import Learner
from gft_lite.utils.memory import GIB
from gft_lite.utils.paths import PACKAGE

CARDS = {"laptop_8gb": 8, "rtx4070_12gb": 12, "rtx4080_16gb": 16, "rtx4090_24gb": 24}  # GiB


def check(setup: Setup, notes: Notes) -> None:
    """Compare the plan and a real step for each model on each card."""
    for card in CARDS:
        for model in MODELS:
            notes.case_once(f"{model} on {card}", fits, setup, model, card)
            free()


def fits(setup: Setup, model: str, card: str) -> Figures:
    """Train the largest micro-batch that the plan allows on a card, under a limit of its size."""
    limit = CARDS[card] * GIB
    plan = planned(setup, model, card, limit)
    budget, policy_settings = plan.choice.micro_batch_tokens, plan.model.recipe.policy
    beside = sum(plan.training.get(name, 0) for name in ("context", "engine", "kv_cache"))
    policy = random_policy(setup, policy_settings)
    recipe = plan.model.recipe
    train = recipe.train.model_copy(update={"micro_batch_tokens": budget})
    # No engine runs here, and the card's may not be installed.
    rollout = recipe.rollout.model_copy(update={"engine": "transformers"})
    learner = Learner(policy, recipe.model_copy(update={"train": train, "rollout": rollout}))
    free()
    with capped(setup, limit - beside), Peak(setup.device, held(policy)) as peak:
        try:
            done = learner.update(largest(plan), progress=0.5)
            fitted = done.micro_batch_tokens == budget and done.skipped is None
        except (MemoryError, torch.OutOfMemoryError):
            fitted = False
    needed = sum(plan.training.values())
    return {
        "plan_fits": not plan.problems,
        "plan_problems": "; ".join(plan.problems),
        "settings": plan.settings,
        "cap_gib": (limit - beside) / GIB,
        "predicted_gib": (needed - beside) / GIB,  # With the allocator's fragmentation.
        "peak_gib": peak.gib,
        "training_fits": fitted,
        "right": fitted or needed > limit,
    }


def planned(setup: Setup, model: str, card: str, limit: int) -> Plan:
    """The plan for a card's recipe with the policy settings that the plan chose."""
    file = PACKAGE.parent / "configs" / "hardware" / f"{card}.yaml"
    sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    sections["train"] |= {"problems_per_step": 1}  # A group is more than any micro-batch takes.
    recipe = setup.recipe(model, **sections)
    plan = choose(MemoryModel(setup.shape(model), recipe, "cuda"), limit)
    chosen = {
        name.removeprefix("policy."): value
        for name, value in plan.settings.items()
        if name.startswith("policy.")
    }
    settled = recipe.model_copy(update={"policy": recipe.policy.model_copy(update=chosen)})
    return choose(MemoryModel(plan.model.shape, settled, "cuda"), limit)


def largest(plan: Plan) -> list[Row]:
    """A prompt of full length with as many full responses as the micro-batch can hold."""
    model, budget = plan.model, plan.choice.micro_batch_tokens
    prompt, longest = tuple(range(2, 2 + model.prompt)), model.longest_row - model.prompt
    left = max(longest, budget - model.prompt)
    lengths = [longest] * (left // longest) + [left % longest] * (left % longest > 0)
    vocabulary = model.shape.vocabulary
    return [
        Row(prompt, tuple(2 + (i * 7 + n) % (vocabulary - 2) for i in range(length)),
            (-1.0) ** n, 1 / left)
        for n, length in enumerate(lengths)
    ]  # fmt: skip


@contextmanager
def capped(setup: Setup, size: int) -> Iterator[None]:
    """Limit torch to `size` bytes of the device."""
    if setup.device == "cpu":
        yield
        return
    total: Any = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
