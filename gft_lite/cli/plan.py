"""`gft-lite plan`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gft_lite.cli.common import DONE, add_recipe
from gft_lite.cli.parser import add_command

if TYPE_CHECKING:
    from gft_lite.planning.planner import Plan
    from gft_lite.planning.solve import Solution


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "plan", "how much memory a recipe takes, and what fits", group="train",
        description="Predicts the peak memory of training and rollouts by component, without "
        "loading the model, and lists on which cards the recipe fits.",
        examples=[
            "gft-lite plan recipes/qwen_math_1p5b.yaml --gpu 12GiB",
            "gft-lite plan recipes/qwen_math_1p5b.yaml --gpu rtx4090 --json",
        ],
    )  # fmt: skip
    add_recipe(parser)
    parser.add_argument("--gpu", metavar="SIZE|NAME", help="12GiB, 4090, h200 (default: this "
                        "machine's GPU, or else its free RAM)")  # fmt: skip
    parser.add_argument("--solve", metavar="FIELD", help="print the largest value that fits of "
                        "group.size, rollout.max_tokens, data.max_prompt_tokens or "
                        "policy.lora.rank")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.policy.model_files import check_model_files
    from gft_lite.recipe.schema import Recipe

    recipe = Recipe.load(options.recipe, options.overrides)
    check_model_files(recipe.policy, needs_weights=False)
    from gft_lite.planning.planner import plan_for, plans_on_cards
    from gft_lite.planning.solve import find_quantity, solve

    field = options.solve and find_quantity(options.solve, recipe)
    plan = plan_for(recipe, options.gpu)
    solution = solve(plan.model, plan.limit, field) if field else None
    on_cards = [] if solution else plans_on_cards(plan)
    if options.json:
        import json

        found = plan.to_json() | {"cards": [p.to_json() for p in on_cards]}
        if solution:
            found["solution"] = {solution.field: solution.value, "why": solution.why}
        print(json.dumps(found, indent=2))
    elif solution:
        print_solution(plan, solution)
    else:
        print_plan(plan, on_cards)
    return DONE


def print_solution(plan: Plan, solution: Solution) -> None:
    """Print what fits, on what, and at which settings."""
    from gft_lite.planning import tables as plan_table
    from gft_lite.utils.memory import GIB

    print(plan_table.headline(plan.model))
    if assumed := plan_table.assumptions(plan.model):
        print(assumed)
    print(f"on {plan.where} with {plan.limit / GIB:.4g} GiB: {solution.describe()}")
    if solution.value:
        peak = solution.plan.peak / GIB
        print(f"at the peak {peak:.2f} GiB, with {plan_table.overrides(solution.plan)}")


def print_plan(plan: Plan, on_cards: list[Plan]) -> None:
    """Print the tables of a plan."""
    from rich.console import Console

    from gft_lite.planning import tables as plan_table
    from gft_lite.planning.planner import CARDS, what_would_fit

    console = Console()
    console.print(plan_table.headline(plan.model), highlight=False)
    if assumed := plan_table.assumptions(plan.model):
        console.print(assumed, highlight=False, markup=False)
    for table in (
        plan_table.components(plan),
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
