"""`gft-lite groups`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import (
    DONE,
    add_allow_code,
    add_output,
    add_recipe,
    add_verbosity,
    check_recipe_trust,
    show_imports,
    whole_number,
)
from gft_lite.cli.parser import add_command


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "groups", "sample and score groups once, to train without rollouts",
        group="train",
        description="Samples and scores the groups of a recipe with its untrained policy. "
        "Training then reads them instead of sampling (group.offline), which is "
        "off-policy. The same command continues after an interruption.",
        examples=[
            "gft-lite groups recipes/lab.yaml --out groups/lab",
            "gft-lite train recipes/lab.yaml group.offline=groups/lab",
        ],
    )  # fmt: skip
    add_recipe(parser)
    add_output(parser, "default: the recipe's group.offline, else groups/NAME")
    parser.add_argument("--visits", type=whole_number(1, 1000), default=1, metavar="N",
                        help="draw at most N groups of each problem (default: 1)")  # fmt: skip
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run, again="the same command continues")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.cli.inputs import check_inputs
    from gft_lite.recipe.schema import Recipe

    recipe = Recipe.load(options.recipe, options.overrides)
    check_recipe_trust(options, recipe)
    check_inputs(recipe)
    with show_imports():
        from gft_lite.training.presample import presample
    from rich.console import Console

    from gft_lite.utils.tables import results_table

    groups = presample(recipe, options.out, visits=options.visits)
    console = Console()
    console.print(results_table(groups.by_source(), f"{len(groups)} groups, {groups.flat} flat"))
    console.print(f"train from them: group.offline={groups.folder}", markup=False, soft_wrap=True)
    return DONE
