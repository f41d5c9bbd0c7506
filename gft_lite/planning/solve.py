"""The largest group, response, prompt or rank with which a recipe fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gft_lite.objective.methods import METHODS
from gft_lite.planning.memory import MemoryModel
from gft_lite.planning.planner import Plan, choose
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import UserError, nearest

VLLM_RANK = 512  # The largest that vLLM serves.
MOST_RESPONSES = 1024


@dataclass(frozen=True, slots=True)
class Quantity:
    """A field to solve for: its short names, the recipe with a value, and the largest value."""

    names: tuple[str, ...]
    set: Callable[[Recipe, int], Recipe]
    highest: Callable[[MemoryModel], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Solution:
    """The largest value of a field that fits, 0 if none does, and why a larger one does not."""

    field: str
    value: int
    plan: Plan
    why: str

    def describe(self) -> str:
        """One line for the terminal."""
        if not self.value:
            return f"{self.field}: not even 1 fits: {self.why}"
        return f"{self.field}={self.value} is the largest that fits: {self.why}"


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    part = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: part})


def _with_size(recipe: Recipe, size: int) -> Recipe:
    return _with(recipe, "group", self=size - recipe.group.expert - recipe.group.teacher)


def _with_rank(recipe: Recipe, rank: int) -> Recipe:
    return _with(recipe, "policy", lora=recipe.policy.lora.model_copy(update={"rank": rank}))


def _longest_response(model: MemoryModel) -> tuple[int, str]:
    prompt = model.recipe.data.max_prompt_tokens or 1
    return model.context - prompt - 1, f"the context of {model.context:,} tokens ends there"


def _longest_prompt(model: MemoryModel) -> tuple[int, str]:
    room = model.context - model.recipe.rollout.max_tokens - 1
    return max(1, room), f"the context of {model.context:,} tokens ends there"


QUANTITIES: Mapping[str, Quantity] = {
    "group.size": Quantity(
        ("k", "group", "size", "group.self"), _with_size,
        lambda _: (MOST_RESPONSES, "micro-batches and rollouts split a group, so K takes time, "
                   "not memory"),
    ),
    "rollout.max_tokens": Quantity(
        ("max_tokens", "response", "tokens"),
        lambda recipe, n: _with(recipe, "rollout", max_tokens=n), _longest_response,
    ),
    "data.max_prompt_tokens": Quantity(
        ("max_prompt_tokens", "prompt"),
        lambda recipe, n: _with(recipe, "data", max_prompt_tokens=n), _longest_prompt,
    ),
    "policy.lora.rank": Quantity(
        ("rank", "lora.rank", "lora"), _with_rank,
        lambda _: (VLLM_RANK, "vLLM serves no larger one"),
    ),
}  # fmt: skip


def find_quantity(text: str, recipe: Recipe) -> str:
    """The field that `text` names. Raises: UserError for any other, or one without effect."""
    short = {name: field for field, q in QUANTITIES.items() for name in (field, *q.names)}
    field = short.get(text.lower())
    if field is None:
        close = nearest(text, short)
        hint = f" Did you mean {short[close]}?" if close else ""
        rule = f"must be one of {', '.join(QUANTITIES)}"
        raise UserError([f"--solve: {rule}, got {text!r}.{hint}"])
    method = METHODS.get(recipe.method)
    if field == "group.size" and method and "self" not in method.sources:
        rule = f"must be another field with method {recipe.method}, which samples no responses"
        raise UserError([f"--solve: {rule}, got {field}. Use rollout.max_tokens."])
    return field


def solve(model: MemoryModel, limit: int, field: str) -> Solution:
    """The largest value of a field of QUANTITIES with which the recipe fits in `limit` bytes."""
    quantity = QUANTITIES[field]
    lowest = model.recipe.group.expert + model.recipe.group.teacher + 1
    low = max(1, lowest if field == "group.size" else 1)
    highest, end = quantity.highest(model)

    def plan_with(value: int) -> Plan:
        return choose(replace(model, recipe=quantity.set(model.recipe, value)), limit)

    best, last = plan_with(low), plan_with(highest)
    if best.problems:
        return Solution(field, 0, best, " and ".join(best.problems))
    if not last.problems:
        return Solution(field, highest, last, end)
    high = highest
    while high - low > 1:
        middle = (low + high) // 2
        tried = plan_with(middle)
        if tried.problems:
            high, last = middle, tried
        else:
            low, best = middle, tried
    return Solution(field, low, best, f"with {high:,}, {' and '.join(last.problems)}")
