"""`gft-lite referee`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gft_lite.cli.common import (
    DONE,
    FAILED,
    MAX_SEEDS,
    add_allow_code,
    add_output,
    add_recipe,
    add_verbosity,
    show_imports,
    whole_number,
)
from gft_lite.cli.parser import add_command

if TYPE_CHECKING:
    from gft_lite.experiments.outcomes import Comparison
    from gft_lite.experiments.referee_plan import RefereeOptions, RefereePlan
    from gft_lite.experiments.verdict import Verdict


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "referee", "which method is better, and by how much", group="compare",
        description="Tunes the learning rate of every method alike, trains each with an equal "
        "budget and several seeds, and prints paired differences with 95% intervals"
        " and a verdict: better, worse, equal within the margin, or not separable. "
        "The same command continues after an interruption; more seeds or methods "
        "only add runs.",
        examples=[
            "gft-lite referee recipes/lab.yaml --methods gft,sft,grpo,sft+grpo",
            "gft-lite referee recipes/lab.yaml --methods gft,sft --dry-run",
        ],
    )  # fmt: skip
    add_recipe(parser)
    _add_comparison(parser.add_argument)
    _add_execution(parser)
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run, again="the same command continues")


def _add_comparison(option: Callable[..., Any]) -> None:
    """Add the options that decide what is compared, and by which rules."""
    option(
        "--methods",
        required=True,
        metavar="A,B,A+B",
        help="names of methods, recipe files or module:METHOD; A+B are stages",
    )
    option(
        "--seeds",
        type=whole_number(1, MAX_SEEDS),
        default=5,
        metavar="N",
        help="runs of each method on each base (default: 5; the plan says what they can find)",
    )
    option("--bases", metavar="MODEL,MODEL", help="default: the recipe's model")
    option(
        "--equal",
        default="trajectories",
        metavar="UNIT",
        help="trajectories, tokens or seconds (default: trajectories)",
    )
    option(
        "--budget",
        type=whole_number(1, 10**15),
        metavar="N",
        help="of each run, in the unit of --equal (default: the recipe's)",
    )
    option(
        "--tune",
        type=whole_number(1, 99),
        default=3,
        metavar="N",
        help="learning rates to try for each method (default: 3; 1: no tuning)",
    )
    option(
        "--tune-set",
        metavar="NAME",
        help="one of eval.sets (default: problems kept from the training data)",
    )
    option(
        "--margin",
        type=float,
        default=0.01,
        metavar="D",
        help="smallest difference worth having (default: 0.01)",
    )
    option("--against", metavar="METHOD", help="default: the first of --methods")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide where and how the runs are made."""
    option = parser.add_argument
    option(
        "--jobs",
        type=whole_number(1, 1024),
        metavar="N",
        help="runs at a time (default: 1; with ray what fits)",
    )
    option("--launcher", default="local", metavar="NAME", help="local or ray")
    words = "load the base and start the engine anew for every run"
    option("--separate", action="store_true", help=words)
    add_output(parser, "default: runs/referee/NAME")
    option("--dry-run", action="store_true", help="print the plan and stop")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.experiments.referee_plan import RefereeOptions, make_plan

    wanted = RefereeOptions(
        recipe=options.recipe,
        methods=_names(options.methods),
        overrides=tuple(options.overrides),
        seeds=options.seeds,
        bases=_names(options.bases),
        equal=options.equal,
        budget=options.budget,
        tune=options.tune,
        margin=options.margin,
        against=options.against,
        tune_set=options.tune_set,
    )
    if not options.allow_code:
        _check_trust(wanted)
    plan = make_plan(wanted)
    out = Path(options.out or Path("runs") / "referee" / Path(options.recipe).stem)
    if options.dry_run:
        _print_plan(plan, out)
        return DONE
    _check_inputs(plan)
    with show_imports():
        from gft_lite.experiments.referee import referee
    from gft_lite.experiments.referee_files import write_referee

    comparison = referee(plan, out, jobs=options.jobs, launcher=options.launcher,
                         share=not options.separate)  # fmt: skip
    found = write_referee(comparison, out)
    _print(comparison, found[comparison.headline], out)
    return FAILED if comparison.failures else DONE


def _check_inputs(plan: RefereePlan) -> None:
    """Raises: RecipeError if a model or data set of the plan is not there."""
    from gft_lite.cli.inputs import check_inputs

    policies = [plan.recipe.policy.model_copy(update={"model": base}) for base in plan.bases]
    check_inputs(*(plan.recipe.model_copy(update={"policy": policy}) for policy in policies))


def _print_plan(plan: RefereePlan, out: Path) -> None:
    from rich.console import Console

    from gft_lite.experiments.referee_costs import method_table, plan_lines

    console, table = Console(), method_table(plan)
    console.print(table.title, style="bold", highlight=False)
    console.print(table.rich(console.width))
    for line in plan_lines(plan, out):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print(comparison: Comparison, found: Sequence[Verdict], out: Path) -> None:
    """The verdict on the headline, what failed, and where everything is."""
    from rich.console import Console

    from gft_lite.experiments.verdict import headline_sentences, verdict_table

    console, table = Console(), verdict_table(comparison, found)
    console.print(table.title, style="bold", highlight=False)
    console.print(table.rich(console.width))
    lines = [*headline_sentences(comparison, found)]
    lines += [f"failed: {f.method}: {f.run}: {f.reason}" for f in comparison.failures]
    for line in (*lines, f"referee: {out / 'referee.md'}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _check_trust(wanted: RefereeOptions) -> None:
    """Raises: UserError if files from elsewhere name code, or methods are named beside them."""
    from gft_lite.cli.trust import check_code_trust, named_code
    from gft_lite.experiments.referee_methods import code_and_files
    from gft_lite.recipe.schema import Recipe

    code, files = code_and_files(wanted.methods)
    recipe = Recipe.load(wanted.recipe, wanted.overrides)
    check_code_trust([*named_code(recipe), *code], [wanted.recipe, *files])
