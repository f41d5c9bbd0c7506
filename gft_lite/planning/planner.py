"""The choice of a recipe's memory settings: the fastest that fit on a card."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gft_lite.planning.gpus import Machine, named_machine, own_machine, own_ram, parse_size
from gft_lite.planning.memory import Choice, Components, Device, MemoryModel
from gft_lite.planning.model_shape import find_shape
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.memory import GIB

CARDS = (8, 12, 16, 24, 48, 80)  # GiB
# Reading the NF4 weights takes the time of multiplying this many tokens (estimate, 4090 to H100).
DEQUANTIZATION_TOKENS = 300
# Estimate: the share of a step's time that offloading takes.
OFFLOADING_COST = {"offload_checkpoints": 0.02, "offload_embedding": 0.01}
# On a CPU a token costs the same in larger micro-batches (SmolLM2-135M: 570 to 3,930 tokens), which
# only take memory (2.3 to 10.7 GiB).
TOKEN_BUDGETS = {"cuda": (2048, 4096, 8192, 16384), "cpu": (1024,)}
BATCH_SIZES = (128, 64, 32, 16, 8, 4, 2, 1)
AUTO_FIELDS = ("train.micro_batch_tokens", "policy.gradient_checkpointing",
               "policy.offload_checkpoints", "policy.offload_embedding", "rollout.engine",
               "rollout.batch_size", "rollout.gpu_memory")  # fmt: skip
# Fields for which the engines have values of their own if a model can't be planned.
ENGINE_FIELDS = {"rollout.engine", "rollout.batch_size", "rollout.gpu_memory"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings for a recipe on a card of `limit` bytes, and the memory that they take.

    `problems` says what does not fit. `where` names the card for titles.
    """

    model: MemoryModel
    limit: int
    choice: Choice
    training: Components
    rollout: Components
    problems: tuple[str, ...]
    where: str = "a card"

    @property
    def peak(self) -> int:
        """Bytes of the card, or of the process on a CPU, at the peak of loading or a step."""
        phases = (self.model.loading(self.choice), self.training, self.rollout)
        return max(sum(phase.values()) for phase in phases)

    @property
    def predicted_peak(self) -> int:
        """Bytes that torch counts as allocated at the peak of training."""
        outside = ("context", "fragmentation", "engine", "kv_cache", "process", "file")
        own = sum(size for name, size in self.training.items() if name not in outside)
        # By its source, torch goes on counting the memory of a vLLM that sleeps in its process.
        inside = self.model.engine(self.choice) if self.choice.engine == "vllm" else {}
        return own + sum(inside.values())

    @property
    def settings(self) -> dict[str, Any]:
        """The value of every setting, by its name in the recipe."""
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
        """The fields that are `auto` in the recipe."""
        recipe = self.model.recipe
        return frozenset(name for name in self.settings if _value(recipe, name) == "auto")

    def to_json(self) -> dict[str, Any]:
        """The plan as `gft-lite plan --json` prints it."""
        return {
            "limit": self.limit, "fits": not self.problems, "problems": list(self.problems),
            "settings": self.settings, "chosen": sorted(self.chosen), "peak": self.peak,
            "loading": self.model.loading(self.choice), "training": self.training,
            "rollout": self.rollout, "where": self.where,
            "assumptions": list(self.model.shape.assumptions),
        }  # fmt: skip


def choose(model: MemoryModel, limit: int) -> Plan:
    """The fastest settings that fit in `limit` bytes, or those that take least if none fits.

    Values that the recipe sets are kept. vLLM is preferred to all else for its speed; otherwise
    the cost of a step decides: recomputed layers, dequantisation per micro-batch, offloading.
    """
    model = model if model.card else replace(model, card=limit)
    return min((_plan(model, limit, choice) for choice in _choices(model, limit)), key=_rank)


def _rank(plan: Plan) -> tuple[float, ...]:
    """The order of preference, lower first."""
    if plan.problems:
        phases = (plan.training, plan.rollout)
        return (1, sum(max(sum(parts.values()), plan.limit) for parts in phases))
    return (0, plan.choice.engine != "vllm", _step_cost(plan.model, plan.choice))


def _step_cost(model: MemoryModel, choice: Choice) -> float:
    """Time of a step relative to one without recomputation, dequantisation and offloading.

    The forward counts 2, the backward with respect to activations 2, a recomputed forward 2.
    """
    recomputed = min(choice.gradient_checkpointing, model.shape.layers) / model.shape.layers
    dequantization = DEQUANTIZATION_TOKENS / choice.micro_batch_tokens
    offloading = sum(share for name, share in OFFLOADING_COST.items() if getattr(choice, name))
    return (4 + 2 * recomputed) / 4 * (1 + dequantization) * (1 + offloading)


def _choices(model: MemoryModel, limit: int) -> Iterator[Choice]:
    """Every combination that the recipe allows, with the most rows that a rollout can hold."""
    cuda, layers = model.device == "cuda", model.shape.layers

    def options(name: str, candidates: Iterable[Any]) -> list[Any]:
        value = _value(model.recipe, name)
        return list(candidates) if value == "auto" else [value]

    sizes = sorted({model.batch(t).tokens for t in (1, *TOKEN_BUDGETS[model.device])})
    training = itertools.product(
        options("train.micro_batch_tokens", sizes),
        options("policy.gradient_checkpointing", range(layers + 1)),
        options("policy.offload_checkpoints", (False, True) if cuda else (False,)),
    )
    rollouts = itertools.product(
        options("policy.offload_embedding", {False, cuda and not model.shape.tied}),
        options("rollout.engine", ("vllm", "transformers") if cuda else ("transformers",)),
    )
    fitting = []
    for offload, engine in rollouts:
        sized = [_with_share(model, limit, Choice(0, 0, False, offload, engine, rows))
                 for rows in options("rollout.batch_size", BATCH_SIZES)]  # fmt: skip
        fits = (c for c in sized if not _rollout_problems(model, limit, c))
        fitting.append(next(fits, sized[-1]))
    for (tokens, n, offload), rollout in itertools.product(training, fitting):
        n = {True: layers, False: 0}[n] if isinstance(n, bool) else min(n, layers)
        # Offloading moves the saved activations of the layers without recomputation as well.
        if not offload or n == layers or model.recipe.policy.offload_checkpoints is True:
            yield replace(rollout, micro_batch_tokens=tokens, gradient_checkpointing=n,
                          offload_checkpoints=offload)  # fmt: skip


def _with_share(
    model: MemoryModel, limit: int, choice: Choice, *, training: bool = False
) -> Choice:
    """The choice with vLLM's share of the card: the recipe's, or all that is free in a rollout.

    With `training`, the memory must be free in training as well. The KV cache gets no more than
    its rows can fill.
    """
    if model.device != "cuda" or not model.shares_device(choice):
        return choice
    share = model.recipe.rollout.gpu_memory
    if not isinstance(share, str):
        return replace(choice, gpu_memory=share)
    bare = replace(choice, gpu_memory=0.0)
    taken = sum(model.rollout(bare).values())
    if training:
        taken = max(taken, sum(model.training(bare).values()))
    cache = max(0, min(limit - taken, model.largest_cache(choice.batch_size)))
    wanted = (sum(model.engine(bare).values()) + cache) / model.card
    return replace(choice, gpu_memory=min(math.floor(10_000 * wanted) / 10_000, 0.99))


def _plan(model: MemoryModel, limit: int, choice: Choice) -> Plan:
    if not model.sleeps:
        choice = _with_share(model, limit, choice, training=True)
    training, rollout = model.training(choice), model.rollout(choice)
    problems = _rollout_problems(model, limit, choice)
    for phase, parts in (("training", training), ("loading the base", model.loading(choice))):
        if sum(parts.values()) > limit:
            problems.insert(0, f"{phase} needs {sum(parts.values()) / GIB:.1f} GiB")
    return Plan(model, limit, choice, training, rollout, tuple(problems))


def _rollout_problems(model: MemoryModel, limit: int, choice: Choice) -> list[str]:
    """What of a rollout does not fit."""
    parts = model.rollout(choice)
    needed, cache = sum(parts.values()), parts.get("kv_cache", 0)
    if model.shares_device(choice) and cache < model.smallest_cache:
        return [f"engine, {choice.engine}, has {cache / GIB:.1f} GiB left for the KV cache, and "
                f"one sequence needs {model.smallest_cache / GIB:.1f} GiB"]  # fmt: skip
    return [f"rollout needs {needed / GIB:.1f} GiB"] if needed > limit else []


def _value(recipe: Recipe, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(recipe, section), field)


def with_auto(recipe: Recipe) -> Recipe:
    """The recipe with `auto` for every field that the plan can decide."""
    for name in AUTO_FIELDS:
        recipe = _with(recipe, name, "auto")
    return recipe


def _with(recipe: Recipe, name: str, value: Any) -> Recipe:
    section, _, field = name.partition(".")
    part = getattr(recipe, section).model_copy(update={field: value})
    return recipe.model_copy(update={section: part})


def what_would_fit(model: MemoryModel, limit: int) -> str:
    """Overrides under which the recipe fits, with shorter responses where it takes them."""
    recipe = with_auto(model.recipe)
    max_tokens = recipe.rollout.max_tokens
    while max_tokens:
        shorter = _with(recipe, "rollout.max_tokens", max_tokens)
        plan = choose(replace(model, recipe=shorter), limit)
        if not plan.problems:
            settings = plan.settings | {"rollout.max_tokens": max_tokens}
            return " ".join(
                f"{name}={str(value).lower() if isinstance(value, bool) else value}"
                for name, value in settings.items()
                if value != _value(model.recipe, name)
            )
        max_tokens //= 2
    return "a smaller model"


def plan_for(recipe: Recipe, gpu: str | None) -> Plan:
    """The recipe's plan on a GPU of a name or size.

    Without a GPU, the plan is for this machine: its first GPU, or else its free RAM, or as much of
    them as `train.memory`; for a recipe with `policy.device: cuda` the smallest of CARDS on which
    it fits takes the place of the RAM.

    Raises: UserError for an unknown GPU or a model that can't be planned.
    """
    recipe = recipe.with_needed_engine()
    on_cpu = recipe.policy.resolved_device(cuda_available=True) == "cpu"
    machines = _machines(gpu, on_cpu=on_cpu, on_gpu=recipe.policy.device.startswith("cuda"))
    if gpu is None and recipe.train.memory != "auto":
        size = parse_size(recipe.train.memory, "train.memory")
        machines = [replace(machines[0], size=size)]
    shape = find_shape(recipe.policy.model, recipe.policy.revision)
    plans = []
    for machine in machines:
        model = MemoryModel(shape, recipe, "cpu" if on_cpu else machine.device)
        plans.append(replace(choose(model, machine.size), where=machine.name))
        if not plans[-1].problems:
            break
    return plans[-1]


def plans_on_cards(plan: Plan) -> list[Plan]:
    """Plans of the same recipe on each of CARDS, with every field that can be `auto`."""
    recipe = with_auto(plan.model.recipe)
    on_cpu = recipe.policy.resolved_device(cuda_available=True) == "cpu"
    model = replace(plan.model, recipe=recipe, device="cpu" if on_cpu else "cuda", card=0)
    return [choose(model, size * GIB) for size in CARDS]


def _machines(gpu: str | None, *, on_cpu: bool, on_gpu: bool) -> list[Machine]:
    """The machines of which the first is planned for on which the recipe fits."""
    if gpu is not None:
        return [named_machine(gpu)]
    own = own_machine()
    if on_cpu and own.device == "cuda":
        return [own_ram()]
    return [_card(size) for size in CARDS] if on_gpu and own.device == "cpu" else [own]


def _card(size: int) -> Machine:
    return Machine("a card", "cuda", size * GIB)


def resolve(recipe: Recipe, free: int, device: Device, card: int = 0) -> tuple[Recipe, Plan | None]:
    """The recipe with a value for every `auto` of AUTO_FIELDS, and the plan.

    `free` bytes of the `card` may be used, unless `train.memory` sets a limit. A model without
    formulas has no plan, and the fields that are `auto` get the schema's defaults. Without an
    `auto`, a plan that does not fit is no error.

    Raises: UserError if a field is `auto` and nothing fits.
    """
    memory = recipe.train.memory
    limit = free if memory == "auto" else parse_size(memory, "train.memory")
    if recipe.rollout.engine == "auto" and importlib.util.find_spec("vllm") is None:
        recipe = _with(recipe, "rollout.engine", "transformers")
    undecided = {name for name in AUTO_FIELDS if _value(recipe, name) == "auto"} - ENGINE_FIELDS
    try:
        shape = find_shape(recipe.policy.model, recipe.policy.revision)
    except RecipeError:
        defaults = Recipe()
        for name in undecided:
            recipe = _with(recipe, name, _value(defaults, name))
        return recipe, None
    plan = choose(MemoryModel(shape, recipe, device, card), limit)
    if plan.problems and undecided and not shape.assumptions:  # An estimate rules nothing out.
        raise RecipeError(
            [f"{', '.join(sorted(undecided))}: must leave a way to fit in the "
             f"{limit / GIB:.1f} GiB that are free now, got a recipe whose "
             f"{' and '.join(plan.problems)}. What would fit: {what_would_fit(plan.model, limit)}."]
        )  # fmt: skip
    if device == "cpu" and recipe.rollout.kv_cache_mib == "auto":
        cache = plan.rollout.get("kv_cache", 0)  # vLLM takes what the plan counts.
        if plan.model.shares_device(plan.choice):
            recipe = _with(recipe, "rollout.kv_cache_mib", math.ceil(cache / 2**20))
    # An engine that does not fit reports that itself.
    for name in plan.chosen if not plan.problems else plan.chosen - ENGINE_FIELDS:
        recipe = _with(recipe, name, plan.settings[name])
    return recipe, plan
