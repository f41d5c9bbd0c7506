"""`gft-lite plan`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import DONE, add_recipe
from gft_lite.policy.model_files import check_model_files
from gft_lite.recipe.schema import Recipe


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("plan", help="how much memory a recipe takes, and what fits")
    add_recipe(parser)
    parser.add_argument("--gpu", metavar="SIZE|NAME", help="8GiB, rtx4090, h200 (default: the "
                        "smallest card on which the recipe fits)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    recipe = Recipe.load(options.recipe, options.overrides)
    check_model_files(recipe.policy, needs_weights=False)
    from gft_lite.planning.planner import CARDS, plan_for, what_would_fit

    plan, on_cards = plan_for(recipe, options.gpu)
    if options.json:
        import json

        found = plan.to_json() | {"cards": [p.to_json() for p in on_cards]}
        print(json.dumps(found, indent=2))
        return DONE
    from rich.console import Console

    from gft_lite.planning import tables as plan_table

    console = Console()
    console.print(plan_table.headline(plan.model), highlight=False)
    for table in (
        plan_table.components(plan, options.gpu),
        plan_table.settings(plan),
        plan_table.cards(on_cards, CARDS),
    ):
        console.print(table.title, style="bold", highlight=False)
        console.print(table.rich(console.width))
    for problem in plan.problems:
        console.print(f"does not fit: {problem}", highlight=False)
    if plan.problems:
        fitting = what_would_fit(plan.model, plan.limit)
        console.print(f"would fit: {fitting}", highlight=False, soft_wrap=True)
    return DONE
