"""Choosing settings of methods on a tuning set, and recipes that share a budget between stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from gft_lite.experiments.sweep_config import rounded
from gft_lite.recipe.loader import Tree
from gft_lite.recipe.schema import Recipe
from gft_lite.rewards.registry import REWARDS
from gft_lite.utils.errors import UserError


def geometric_rates(center: float, count: int) -> tuple[float, ...]:
    """`count` learning rates a factor of 2 apart around `center`; of an even count, one more above.

    They are rounded to four significant digits.
    """
    first = -((count - 1) // 2)
    return tuple(rounded(center * 2.0**i) for i in range(first, first + count))


def further_rates(rates: Iterable[float], best: float) -> tuple[float, float]:
    """Two rates beyond `best` if it is the lowest or highest of `rates`, else on both sides of it.

    Beyond by factors of 2 and 4; between by a factor of the square root of 2.
    """
    ordered = sorted(rates)
    factors = (2**-0.5, 2**0.5)
    if best in (ordered[0], ordered[-1]):
        factors = (0.5, 0.25) if best == ordered[0] else (2.0, 4.0)
    return rounded(best * factors[0]), rounded(best * factors[1])


def best_rate(scores: Mapping[float, float]) -> float:
    """The rate with the highest score; of equal scores, the lowest rate."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def stages(layers: Sequence[Mapping[str, Any]]) -> list[Tree]:
    """The field `stages` of a recipe, whose stages have a `method` and other fields each."""
    found = []
    for layer in layers:
        overrides = deepcopy(dict(layer))  # YAML would have aliases for parts that are the same.
        found.append({"method": overrides.pop("method"), "overrides": overrides})
    return found


def check_correctness(recipe: Recipe) -> None:
    """Raises: UserError for a recipe without a reward that decides what is correct."""
    functions = recipe.reward.functions
    if not any(
        f.correct_above is not None
        or (f.name in REWARDS and REWARDS[f.name].correct_above is not None)
        for f in functions
    ):
        names = ", ".join(f.name for f in functions)
        rule = "reward.functions: must have a rule that compares the answer"
        raise UserError([f"{rule}, because methods are tuned by pass@1, got {names}. Add exact."])
