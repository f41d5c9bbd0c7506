"""What several commands share: exit codes, arguments, and the question of whose code may run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gft_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from gft_lite.evaluation.targets import Target


DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe and what to change in it."""
    parser.add_argument("recipe", help="a recipe file, or a shipped one: recipes/lab.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="optim.lr=1e-5 group.self=6"
    )


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Leave to run other people's code."""
    words = "run code that a file from outside the working directory names"
    parser.add_argument("--allow-code", action="store_true", help=words)


def refuse_foreign_recipe(options: argparse.Namespace, recipe: Recipe) -> None:
    """Without --allow-code no recipe from elsewhere may name code."""
    if not options.allow_code:
        from gft_lite.cli.trust import named_code, refuse_foreign_code

        refuse_foreign_code(named_code(recipe), [options.recipe])


def refuse_foreign_models(targets: Sequence[Target]) -> None:
    """Without --allow-code no run from elsewhere may name a model whose code is trusted."""
    from gft_lite.cli.trust import refuse_foreign_code, remote_code

    for target in targets:
        if target.run:
            refuse_foreign_code(remote_code(target.policy), [target.run / "recipe.yaml"])
