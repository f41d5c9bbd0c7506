"""Whole optimiser steps of GFT at the paper's lengths, with each of our switches on and off.

One step is a batch of five groups, 24,000 response tokens at full size. Each case differs from
`default` in what its name says; all take the same step from the same weights, so that their
losses agree.
"""

from __future__ import annotations

from typing import Any

from benchmarks.against_trl import rows
from benchmarks.gpu_check.meter import Peak
from benchmarks.gpu_check.parts import Figures, Notes, Skip
from benchmarks.gpu_check.scale import LARGE, MIDDLE, SMALL, Setup
from benchmarks.gpu_check.work import (
    flops,
    free,
    held,
    make_groups,
    predicted_gib,
    random_policy,
    timed,
    with_settings,
)
from gft_lite.planning.memory import Choice, MemoryModel
from gft_lite.policy.lora import LoraPolicy
from gft_lite.recipe.schema import Recipe
from gft_lite.training.learner import Learner

FLAT = 2  # of five groups
PLAIN = {"policy": {"layout": "padded", "fused_head": False}, "optim": {"name": "adamw"},
         "train": {"drop_zero_advantage": False}}  # fmt: skip
# What matters most comes first.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "all_off": PLAIN,
    "no_layer_recomputed": {"policy": {"gradient_checkpointing": False}},
    "layout_padded": {"policy": {"layout": "padded"}},
    "head_not_fused": {"policy": {"fused_head": False}},
    "40_percent_flat": {"flat": FLAT},
    "40_percent_flat_kept": {"flat": FLAT, "train": {"drop_zero_advantage": False}},
    "layout_packed": {"policy": {"layout": "packed"}},
    "large_micro_batches": {"train": {"micro_batch_tokens": 2.0}},  # Times the default.
    "checkpoints_on_cpu": {"policy": {"offload_checkpoints": True}},
    "half_recomputed": {"policy": {"gradient_checkpointing": 0.5}},  # Of the layers.
    "adamw": {"optim": {"name": "adamw"}},
    "all_off_40_percent_flat": PLAIN | {"flat": FLAT},
    "default_again": {},  # How far two measurements of one thing are apart.
    "embedding_on_cpu": {"policy": {"offload_embedding": True}},  # The last: it stays there.
}
FEW = ("default", "all_off", "no_layer_recomputed")


def check_middle(setup: Setup, notes: Notes) -> None:
    """Every case on the 7B model."""
    _check(setup, notes, MIDDLE, tuple(CASES))


def check_small(setup: Setup, notes: Notes) -> None:
    """Every case on the 1.5B model."""
    _check(setup, notes, SMALL, tuple(CASES))


def check_large(setup: Setup, notes: Notes) -> None:
    """The first and the last on the 8B model."""
    _check(setup, notes, LARGE, FEW)


def _check(setup: Setup, notes: Notes, model: str, names: tuple[str, ...]) -> None:
    built: list[LoraPolicy] = []

    def build() -> Figures:
        settings = setup.recipe(model).policy
        with Peak(setup.device) as peak:
            policy, seconds = timed(setup, lambda: random_policy(setup, settings))
        built.append(policy)
        return {"layout": policy.layout, "seconds": seconds, "peak_gib": peak.gib}

    if notes.case("build", build) is None:
        return
    for name in names:
        notes.case_once(name, step, setup, model, built[0], CASES[name])
        free()


def step(setup: Setup, model: str, policy: LoraPolicy, changes: dict[str, Any]) -> Figures:
    """Take a step, after a short one that warms up. Where the optimiser pages its states, torch
    does not see them."""
    shape = setup.shape(model)
    recipe = _recipe(setup, model, changes)
    if recipe.policy.offload_embedding and shape.tied:
        raise Skip("its output head is its input embedding")
    policy = with_settings(policy, recipe.policy)
    flat = changes.get("flat", 0)
    every = rows(recipe, make_groups(setup, shape.vocabulary, flat=flat))
    settings: Any = recipe.policy  # Nothing in it is left to the plan.
    budget: Any = recipe.train.micro_batch_tokens
    learner = Learner(policy, recipe)
    kept = learner.prepare_rows(every)
    batches = learner.make_micro_batches(kept)
    learner.update(kept[:2], progress=0.5)  # Makes the optimiser's states.
    with Peak(setup.device, held(policy)) as peak:
        done, seconds = timed(setup, lambda: learner.update(kept, progress=0.5))
    recomputed = _layers(settings.gradient_checkpointing, shape.layers)
    choice = Choice(budget, recomputed, settings.offload_checkpoints, settings.offload_embedding,
                    "transformers", 1)  # fmt: skip
    predicted = predicted_gib(MemoryModel(shape, recipe, setup.device), choice, batches)
    trained = sum(len(row.response_ids) for row in every)
    return {
        "layout": policy.layout,
        "micro_batches": len(batches),
        "halved": done.micro_batch_tokens != budget,
        "seconds": seconds,
        "trained_tokens_per_s": trained / seconds,
        "forwarded_tokens_per_s": done.forwarded / seconds,
        "forwarded_per_trained": done.forwarded / trained,
        "useful_tflop_per_s": flops(shape, batches, 0) / seconds / 1e12,
        "done_tflop_per_s": flops(shape, batches, recomputed / shape.layers) / seconds / 1e12,
        "peak_gib": peak.gib,
        "predicted_gib": predicted,
        "over_plan_percent": 100 * (peak.gib / predicted - 1),
        "loss": done.loss,
        "grad_norm": done.grad_norm,
    }


def _recipe(setup: Setup, model: str, changes: dict[str, Any]) -> Recipe:
    """The case's recipe, its shares of layers and of the budget made numbers of them."""
    sections = {name: dict(own) for name, own in changes.items() if name != "flat"}
    policy, train = sections.get("policy", {}), sections.get("train", {})
    share = policy.get("gradient_checkpointing")
    if isinstance(share, float):
        policy["gradient_checkpointing"] = round(share * setup.shape(model).layers)
    if "micro_batch_tokens" in train:
        train["micro_batch_tokens"] = int(train["micro_batch_tokens"] * setup.sizes.micro_batch)
    return setup.recipe(model, **sections)


def _layers(wanted: bool | int, layers: int) -> int:
    return {True: layers, False: 0}[wanted] if isinstance(wanted, bool) else wanted
