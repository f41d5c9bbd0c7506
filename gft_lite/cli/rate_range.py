"""`gft-lite train --lr-range`, and the rate of `optim.lr: auto` in a dry run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gft_lite.cli.common import DONE, show_imports
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import write_text_atomic

if TYPE_CHECKING:
    from gft_lite.recipe.schema import Recipe
    from gft_lite.training.rate_range import RateRange
    from gft_lite.utils.tables import Table

AUTOMATIC = (0.0, 0.0)  # --lr-range without limits; no text, which argparse would convert.
_FIGURES = {"loss": "loss", "reward": "own reward", "grad_norm": "gradient norm",
            "kl": "KL"}  # fmt: skip


def rate_limits(text: str) -> tuple[float, float]:
    """The type of --lr-range."""
    rule = "must be LOW:HIGH, two rates above 0 of which the second is higher"
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low = high = math.nan
    if not 0 < low < high < math.inf:
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
    return low, high


def with_known_rate(recipe: Recipe) -> Recipe:
    """The recipe with the rate that `optim.lr: auto` is, if that is known without torch."""
    from gft_lite.objective.methods import METHODS
    from gft_lite.planning.learning_rate import automatic_rate, with_rate
    from gft_lite.planning.model_shape import find_shape

    method = METHODS.get(recipe.method)
    if recipe.optim.lr != "auto":
        return recipe
    try:
        width = find_shape(recipe.policy.model).hidden
    except RecipeError:
        width = 0
    if method is None or not width:
        print("optim.lr: auto becomes a number when training starts.", file=sys.stderr)
        return recipe
    rate = automatic_rate(recipe, width, group_advantages=method.group_advantages)
    return with_rate(recipe, rate)


def run_range_test(recipe: Recipe, options: argparse.Namespace) -> int:
    """Run a range test, print its table and advice, and write both with a plot."""
    with show_imports():
        from gft_lite.training.rate_range import range_test
    from rich.console import Console

    from gft_lite.report.rate_plot import write_rate_plot

    folder = Path(options.out or f"runs/{recipe.name}-lr-range")
    found = range_test(recipe, None if options.lr_range == AUTOMATIC else options.lr_range)
    rates = [point.rate for point in found.points]
    values = {n: [getattr(point, n) for point in found.points] for n in _FIGURES}
    figures = {_FIGURES[n]: v for n, v in values.items() if any(x is not None for x in v)}
    table = _table(rates, figures, found)
    write_rate_plot(folder, rates, figures, found.rate, f"{recipe.name}: {recipe.method}")
    advice = f"advice: optim.lr={found.rate:g}" if found.rate else "no advice"
    summary = f"{found.ended}\n{advice}: {found.reason}."
    write_text_atomic(folder / "lr-range.md", f"{table.markdown()}\n{summary}\n")
    write_text_atomic(folder / "lr-range.json", json.dumps(asdict(found), indent=1))
    console = Console()
    console.print(table.rich(console.width))
    for line in (*summary.splitlines(), f"plot: {folder / 'lr-range.svg'}"):
        console.print(line, markup=False, soft_wrap=True)
    return DONE


def _table(rates: list[float], figures: dict[str, list[float | None]], found: RateRange) -> Table:
    """A row for each step; the step with the best figure is marked."""
    from gft_lite.utils.tables import Table

    rows = [
        (f"{rate:.1e}{' best' if i == found.best else ''}",
         *("-" if v[i] is None else f"{v[i]:.3g}" for v in figures.values()))
        for i, rate in enumerate(rates)
    ]  # fmt: skip
    return Table("Learning-rate range test", ("rate", *figures), tuple(rows))
