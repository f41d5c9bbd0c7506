"""`gft-lite methods`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import DONE
from gft_lite.recipe.schema import Recipe


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("methods", help="the table of training methods")
    parser.set_defaults(run=run)


_LEGEND = """
E, T, S    expert, teacher and self rows of each problem; - where the method takes none
p, rho     the token's probability; rho = p / p at the rollout; sg stops the gradient
clip(rho)  rho within 1 - objective.clip_low and 1 + objective.clip_high
A, C(p)    the group's advantage; p below objective.tau, else 1
KL         KL(reference || policy) over the whole vocabulary
Numbers are defaults: group, objective and optim.lr in the recipe change them.\
"""


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from rich.console import Console
    from rich.table import Table

    from gft_lite.objective.methods import METHODS

    table = Table("method", "E", "T", "S", "loss of a token", "needs", "reduction", "lr",
                  "arXiv", box=None, padding=(0, 1, 0, 0))  # fmt: skip
    for name, method in METHODS.items():
        recipe = Recipe.from_tree({"method": name})
        rows = [str(getattr(recipe.group, s)) if s in method.sources else "-"
                for s in ("expert", "teacher", "self")]  # fmt: skip
        reduction, lr = recipe.objective.reduction, f"{recipe.optim.lr:g}"
        table.add_row(name, *rows, method.formula, ", ".join(method.needs) or "-", reduction, lr,
                      method.citation.removeprefix("arXiv "))  # fmt: skip
    console = Console()
    console.print(table)
    console.print(_LEGEND, highlight=False)
    return DONE
