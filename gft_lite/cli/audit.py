"""`gft-lite audit`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gft_lite.cli.common import (
    DONE,
    FAILED,
    add_allow_code,
    add_recipe,
    add_verbosity,
    check_recipe_trust,
)
from gft_lite.cli.parser import add_command

if TYPE_CHECKING:
    from rich.table import Table

    from gft_lite.training.audit import Audit, AuditCheck


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "audit", "check that a method's gradient is the one it states", group="check",
        description="Computes the gradient of one step of the recipe's method on a tiny model "
        "in several ways, which must agree: by the equation, by micro-batches of "
        "other sizes, by other layouts of the rows, and by several processes. Exit "
        "code 1 if a difference is above its limit.",
        examples=[
            "gft-lite audit recipes/lab.yaml",
            "gft-lite audit recipes/lab.yaml method=grpo",
        ],
    )  # fmt: skip
    add_recipe(parser)
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.recipe.schema import Recipe

    recipe = Recipe.load(options.recipe, options.overrides)
    check_recipe_trust(options, recipe)
    from rich.console import Console

    from gft_lite.training.audit import audit
    from gft_lite.utils.progress import show_phase, stderr_console

    console, passed = Console(), True
    stages = [recipe.stage(number) for number in range(len(recipe.stages))]
    for each in stages or [recipe]:
        with show_phase(stderr_console(), f"auditing {each.method}"):
            found = audit(each)
        console.print(_table(found), soft_wrap=True)
        passed &= all(check.passed for check in found.checks)
    return DONE if passed else FAILED


def _table(found: Audit) -> Table:
    from rich.table import Table

    table = Table(title=found.title, title_justify="left")
    table.add_column("check")
    for name in ("relative difference", "limit", ""):
        table.add_column(name, justify="right")
    for check in found.checks:
        table.add_row(check.name, *_cells(check))
    return table


def _cells(check: AuditCheck) -> tuple[str, str, str]:
    note = check.note.replace("[", r"\[")
    if check.difference is None:
        return "-", "-", note
    result = "ok" if check.passed else "FAILED"
    return f"{check.difference:.1e}", f"{check.limit:.1e}", f"{result} {note}".strip()
