"""`gft-lite train`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from gft_lite.cli.common import (
    DONE,
    add_allow_code,
    add_output,
    add_overrides,
    add_verbosity,
    check_recipe_trust,
    show_imports,
)
from gft_lite.cli.init import draft_for_training
from gft_lite.cli.parser import add_command
from gft_lite.cli.rate_range import AUTOMATIC, rate_limits, run_range_test, with_known_rate
from gft_lite.utils.errors import UserError

if TYPE_CHECKING:
    from gft_lite.recipe.schema import Recipe


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "train", "train a model by a recipe", group="train",
        description="Trains an adapter by a recipe and writes the run's folder: metrics, "
        "groups, checkpoints, adapter and summary. Ctrl-C stops after the current "
        "step; --resume continues.",
        examples=[
            "gft-lite train recipes/lab.yaml",
            "gft-lite train recipes/lab.yaml optim.lr=1e-3 group.self=6 --out runs/try",
            "gft-lite train runs/lab/recipe.yaml --out runs/lab --resume",
            "gft-lite train --data questions.jsonl --model FOLDER train.steps=20",
            "accelerate launch -m gft_lite train RECIPE     # on all GPUs of the machine",
        ],
    )  # fmt: skip
    words = "a recipe file, or a shipped one such as recipes/lab.yaml"
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=words)
    add_overrides(parser)
    words = "train on this data without a recipe, by the guesses of gft-lite init"
    parser.add_argument("--data", metavar="DATA", help=words)
    parser.add_argument("--model", help="with --data: the folder or hub id of the base model")
    add_output(parser, "the run's folder (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument(
        "--lr-range",
        type=rate_limits,
        nargs="?",
        const=AUTOMATIC,
        metavar="LOW:HIGH",
        help="train a few steps with rising rates until training diverges, and advise a rate; "
        "the limits are optional (plot and table: --out, by default runs/NAME-lr-range)",
    )
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run, again="continue with --resume")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.cli.inputs import check_inputs
    from gft_lite.objective.methods import METHODS

    recipe = _recipe(options)
    if options.lr_range and (options.resume or options.dry_run):
        rule = "must be given without --resume and --dry-run, as it is a training of its own"
        raise UserError([f"--lr-range: {rule}, got both."])
    if options.dry_run:
        recipe = with_known_rate(recipe)
        if recipe.method not in METHODS:
            print("method: a dry run imports no code; the parameters of this method are checked "
                  "when training starts.", file=sys.stderr)  # fmt: skip
        print(recipe.to_yaml(), end="")
        return DONE
    if options.recipe:  # Else all of it was typed.
        check_recipe_trust(options, recipe)
    check_inputs(recipe)
    if options.lr_range:
        return run_range_test(recipe, options)
    from gft_lite.runs.folder import WorkerRunFolder, choose_folder

    if os.environ.get("WORLD_SIZE", "1") == "1":  # Else another process may have begun the run.
        choose_folder(recipe.name, options.out, resume=options.resume)
    with show_imports():
        from gft_lite.training.run import train
    from rich.console import Console

    from gft_lite.utils.tables import results_table

    folder = train(recipe, options.out, resume=options.resume)
    if isinstance(folder, WorkerRunFolder):
        return DONE
    summary = folder.summary()
    console = Console()
    figures = {"base": summary["base"], "trained": summary["trained"]}
    console.print(results_table(figures, f"{recipe.name}: {recipe.method}"))
    console.print(f"run: {folder.path}", markup=False, soft_wrap=True)
    return DONE


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of the file, or of the guesses about --data. Raises: UserError."""
    from gft_lite.recipe.schema import Recipe

    # Without RECIPE, argparse takes the first override for it.
    if options.recipe and options.data and "=" in options.recipe:
        options.overrides = [options.recipe, *options.overrides]
        options.recipe = None
    if (options.recipe is None) == (options.data is None):
        got = "both" if options.recipe else "neither"
        raise UserError(
            [f"RECIPE: must be given, or --data, got {got}. See gft-lite train --help."]
        )
    if options.data is None:
        if options.model is not None:
            rule = "must be given with --data only, got a recipe"
            raise UserError([f"--model: {rule}. Write policy.model={options.model}."])
        return Recipe.load(options.recipe, options.overrides)
    return draft_for_training(options).recipe
