"""`gft-lite methods`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import DONE
from gft_lite.cli.parser import add_command


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "methods", "the table of training methods", group="compare",
        description="Prints every method with the rows it learns from, the loss of a token, the"
        " mean over tokens, its default learning rate and its paper. A recipe "
        "selects one by its name.",
        examples=[
            "gft-lite methods",
            "gft-lite train recipes/lab.yaml method=dapo",
        ],
    )  # fmt: skip
    parser.set_defaults(run=run)


_LEGEND = """
E, T, S    expert, teacher and self rows of a problem; - where the method
           takes none; d: expert and teacher rows, s: self rows
mean       of the tokens' losses: all tokens of a step, or rows first
           (sequence), or a constant number of tokens a row
p, rho     the token's probability; rho = p / p at the rollout
sg         stops the gradient; C(p): p below objective.tau, else 1
clip(rho)  rho within 1 - objective.clip_low and 1 + objective.clip_high
A          the group's advantage; KL: KL(reference || policy)
f(p)       p / (p + g), g = 0.1; q = 1.5 p_old + 0.5; H: the row's entropy
GRPO       -min(rho A, clip(rho) A); p_T: the teacher's probability
Numbers are defaults: group, objective and optim.lr in the recipe change them.\
"""


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from rich.console import Console
    from rich.table import Table

    from gft_lite.objective.methods import METHODS
    from gft_lite.recipe.schema import Recipe

    columns = ("method", "E", "T", "S", "loss of a token", "mean", "lr", "arXiv")
    table = Table(*columns, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name, method in METHODS.items():
        # Any teacher: a method may have to have one of its own.
        recipe = Recipe.from_tree({"method": name, "teacher": {"model": "any"}})
        rows = [str(getattr(recipe.group, s)) if s in method.sources else "-"
                for s in ("expert", "teacher", "self")]  # fmt: skip
        mean = recipe.objective.reduction.removesuffix("_mean")
        paper = method.citation.removeprefix("arXiv ").partition(",")[0]
        table.add_row(name, *rows, method.formula, mean, f"{recipe.optim.rate:.0e}",
                      paper if method.citation.startswith("arXiv") else "-")  # fmt: skip
    console = Console()
    console.print(table)
    console.print(_LEGEND, highlight=False)
    return DONE
