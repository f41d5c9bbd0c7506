"""What a recipe's memory settings should be: the fastest that fit on a card, and why not."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gft_lite.planning.memory import Choice, Components, Device, Job, parse_size
from gft_lite.planning.model_shape import find_shape
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.memory import GIB

CARDS = (8, 12, 16, 24, 48, 80)  # GiB
# NF4 weights are read as fast as so many tokens are multiplied (an estimate for 4090 to H100).
DEQUANTISATION = 300
OFFLOADING = {"offload_checkpoints": 0.02, "offload_embedding": 0.01}  # Estimate: share of time.
TOKENS = {"cuda": (2048, 4096, 8192, 16384), "cpu": (1024, 2048, 4096, 8192)}
BATCH_SIZES = (128, 64, 32, 16, 8, 4, 2, 1)
AUTO = ("train.micro_batch_tokens", "policy.gradient_checkpointing",
        "policy.offload_checkpoints", "policy.offload_embedding", "rollout.engine",
        "rollout.batch_size", "rollout.gpu_memory")  # fmt: skip
# What engines settle for themselves where the model can't be planned.
OPTIONAL = {"rollout.engine", "rollout.batch_size", "rollout.gpu_memory"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings for a recipe on a card of `limit` bytes, and the memory that they take.

    `problems` is empty if all of it fits.
    """

    job: Job
    limit: int
    choice: Choice
    training: Components
    rollout: Components
    problems: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes of the card at the worse of the two phases."""
        return max(sum(self.training.values()), sum(self.rollout.values()))

    @property
    def predicted_peak(self) -> int:
        """Bytes that torch has allocated at the peak of training, as it counts them itself."""
        outside = ("context", "fragmentation", "engine", "kv_cache")
        own = sum(size for name, size in self.training.items() if name not in outside)
        # As its source has it, torch goes on counting what sleeps in its process.
        inside = self.job.engine(self.choice) if self.choice.engine == "vllm" else {}
        return own + sum(inside.values())

    @property
    def settings(self) -> dict[str, Any]:
        """The settled values by their names in the recipe."""
        c = self.choice
        share = {"rollout.gpu_memory": c.gpu_memory} if c.gpu_memory else {}
        return {
            "train.micro_batch_tokens": c.micro_batch_tokens,
            "policy.gradient_checkpointing": c.gradient_checkpointing,
            "policy.offload_checkpoints": c.offload_checkpoints,
            "policy.offload_embedding": c.offload_embedding,
            "rollout.engine": c.engine,
            "rollout.batch_size": c.batch_size,
            **share,
        }

    @property
    def chosen(self) -> frozenset[str]:
        """The fields that the recipe left to the plan."""
        recipe = self.job.recipe
        return frozenset(name for name in self.settings if _value(recipe, name) == "auto")

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "limit": self.limit, "fits": not self.problems, "problems": list(self.problems),
            "settings": self.settings, "chosen": sorted(self.chosen), "peak": self.peak,
            "training": self.training, "rollout": self.rollout,
        }  # fmt: skip


def choose(job: Job, limit: int) -> Plan:
    """The fastest settings that fit in `limit` bytes; where none do, those that take least.

    Fields that the recipe fixes stay. vLLM goes before all else, for its speed; then what a
    step costs decides: recomputed layers, dequantisation per micro-batch, offloading.
    """
    job = job if job.card else replace(job, card=limit)
    return min((_plan(job, limit, choice) for choice in _choices(job, limit)), key=_rank)


def _rank(plan: Plan) -> tuple[float, ...]:
    """Lower is better."""
    if plan.problems:
        phases = (plan.training, plan.rollout)
        return (1, sum(max(sum(parts.values()), plan.limit) for parts in phases))
    return (0, plan.choice.engine != "vllm", _cost(plan.job, plan.choice))


def _cost(job: Job, choice: Choice) -> float:
    """Time of a step relative to forward and backward without any of it.

    A forward counts 2, the backward of activations 2, recomputing a forward once more.
    """
    recomputed = min(choice.gradient_checkpointing, job.shape.layers) / job.shape.layers
    cost = (4 + 2 * recomputed) / 4 * (1 + DEQUANTISATION / choice.micro_batch_tokens)
    return cost * (1 + sum(share for name, share in OFFLOADING.items() if getattr(choice, name)))


def _choices(job: Job, limit: int) -> Iterator[Choice]:
    """Every combination that the recipe leaves open, with the most rows that a rollout takes."""
    cuda, layers = job.device == "cuda", job.shape.layers

    def options(name: str, candidates: Iterable[Any]) -> list[Any]:
        value = _value(job.recipe, name)
        return list(candidates) if value == "auto" else [value]

    sizes = sorted({job.batch(t).tokens for t in (1, *TOKENS[job.device])})
    trunks = itertools.product(
        options("train.micro_batch_tokens", sizes),
        options("policy.gradient_checkpointing", range(layers + 1)),
        options("policy.offload_checkpoints", (False, True) if cuda else (False,)),
    )
    rollouts = itertools.product(
        options("policy.offload_embedding", {False, cuda and not job.shape.tied}),
        options("rollout.engine", ("vllm", "transformers") if cuda else ("transformers",)),
    )
    fitting = []
    for offload, engine in rollouts:
        sized = [_shared(job, limit, Choice(0, 0, False, offload, engine, rows))
                 for rows in options("rollout.batch_size", BATCH_SIZES)]  # fmt: skip
        fitting.append(next((c for c in sized if not _rollout_problems(job, limit, c)), sized[-1]))
    for (tokens, n, offload), rollout in itertools.product(trunks, fitting):
        n = {True: layers, False: 0}[n] if isinstance(n, bool) else min(n, layers)
        # Offloading would take what the other layers save along.
        if not offload or n == layers or job.recipe.policy.offload_checkpoints is True:
            yield replace(rollout, micro_batch_tokens=tokens, gradient_checkpointing=n,
                          offload_checkpoints=offload)  # fmt: skip


def _shared(job: Job, limit: int, choice: Choice, *, training: bool = False) -> Choice:
    """With vLLM's share of the card: the recipe's, or what the trainer leaves at a rollout, and
    in `training` if it is to stay; but no more KV cache than its rows can fill."""
    if job.device != "cuda" or not job.beside(choice):
        return choice
    asked = job.recipe.rollout.gpu_memory
    if not isinstance(asked, str):
        return replace(choice, gpu_memory=asked)
    bare = replace(choice, gpu_memory=0.0)
    taken = sum(job.rollout(bare).values())
    if training:
        taken = max(taken, sum(job.training(bare).values()))
    room = max(0, min(limit - taken, job.full_cache(choice.batch_size)))
    share = (sum(job.engine(bare).values()) + room) / job.card
    return replace(choice, gpu_memory=min(math.floor(10_000 * share) / 10_000, 0.99))


def _plan(job: Job, limit: int, choice: Choice) -> Plan:
    if not job.sleeps:
        choice = _shared(job, limit, choice, training=True)
    training, rollout = job.training(choice), job.rollout(choice)
    problems = _rollout_problems(job, limit, choice)
    if sum(training.values()) > limit:
        problems = [f"training needs {sum(training.values()) / GIB:.1f} GiB", *problems]
    return Plan(job, limit, choice, training, rollout, tuple(problems))


def _rollout_problems(job: Job, limit: int, choice: Choice) -> list[str]:
    """Why a rollout doesn't fit, if it doesn't."""
    parts = job.rollout(choice)
    needed, cache = sum(parts.values()), parts.get("kv_cache", 0)
    if job.beside(choice) and cache < job.least_cache:
        return [f"engine, {choice.engine}, has {cache / GIB:.1f} GiB left for the KV cache, and "
                f"one sequence needs {job.least_cache / GIB:.1f} GiB"]  # fmt: skip
    return [f"rollout needs {needed / GIB:.1f} GiB"] if needed > limit else []


def _value(recipe: Recipe, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(recipe, section), field)


def with_auto(recipe: Recipe) -> Recipe:
    """The recipe with all that the plan can settle left to it."""
    for name in AUTO:
        recipe = _with(recipe, name, "auto")
    return recipe


def _with(recipe: Recipe, name: str, value: Any) -> Recipe:
    section, _, field = name.partition(".")
    part = getattr(recipe, section).model_copy(update={field: value})
    return recipe.model_copy(update={section: part})


def what_would_fit(job: Job, limit: int) -> str:
    """Overrides under which the recipe fits: its own rows, or the longest shorter ones."""
    recipe = with_auto(job.recipe)
    max_tokens = recipe.rollout.max_tokens
    while max_tokens:
        shorter = _with(recipe, "rollout.max_tokens", max_tokens)
        plan = choose(replace(job, recipe=shorter), limit)
        if not plan.problems:
            settings = plan.settings | {"rollout.max_tokens": max_tokens}
            return " ".join(
                f"{name}={str(value).lower() if isinstance(value, bool) else value}"
                for name, value in settings.items()
                if value != _value(job.recipe, name)
            )
        max_tokens //= 2
    return "a smaller model"


def plan_for(recipe: Recipe, gpu: str | None) -> tuple[Plan, list[Plan]]:
    """The recipe's plan on a GPU, by default the smallest of CARDS on which it fits, and what
    would fit on each of CARDS if the recipe left all of it to the plan."""
    recipe = recipe.with_needed_engine()
    device: Device = (
        "cpu" if recipe.policy.resolved_device(cuda_available=True) == "cpu" else "cuda"
    )
    shape = find_shape(recipe.policy.model)
    job, open_job = Job(shape, recipe, device), Job(shape, with_auto(recipe), device)
    sizes = [size * GIB for size in CARDS] if gpu is None else [parse_size(gpu)]
    plans = (choose(job, size) for size in sizes)
    plan = next((p for p in plans if not p.problems), None) or choose(job, sizes[-1])
    return plan, [choose(open_job, size * GIB) for size in CARDS]


def resolve(recipe: Recipe, free: int, device: Device, card: int = 0) -> tuple[Recipe, Plan | None]:
    """The recipe with every `auto` of the plan settled, and the plan.

    `free` bytes of the `card` may be used, unless `train.memory` says how many. Without an
    `auto`, a model that can't be planned has no plan, and a plan that doesn't fit is only returned.
    Raises: RecipeError when something is `auto` and nothing fits, or the model can't be planned.
    """
    limit = free if recipe.train.memory == "auto" else parse_size(recipe.train.memory)
    if recipe.rollout.engine == "auto" and importlib.util.find_spec("vllm") is None:
        recipe = _with(recipe, "rollout.engine", "transformers")
    undecided = [name for name in AUTO if _value(recipe, name) == "auto"]
    asked = set(undecided) - OPTIONAL
    try:
        plan = choose(Job(find_shape(recipe.policy.model), recipe, device, card), limit)
    except RecipeError:
        if asked:
            raise
        return recipe, None
    if plan.problems and asked:
        raise RecipeError(
            [f"{', '.join(sorted(asked))}: must leave a way to fit in {limit / GIB:.1f} GiB, got "
             f"a recipe whose {' and '.join(plan.problems)}. What would fit: "
             f"{what_would_fit(plan.job, limit)}."]
        )  # fmt: skip
    # What doesn't fit finds its own way, or says so itself.
    for name in plan.chosen if not plan.problems else plan.chosen - OPTIONAL:
        recipe = _with(recipe, name, plan.settings[name])
    return recipe, plan
