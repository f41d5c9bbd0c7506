"""`gft-lite doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import DONE, FAILED, add_verbosity, show_imports
from gft_lite.cli.parser import add_command


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "doctor", "what works on this machine, and how to repair the rest", group="check",
        description="Checks versions, hardware, access to the hub, a training step and a hot-"
        "load of an adapter into vLLM, and states what to do about each check that "
        "fails. Exit code 1 if something that training needs fails.",
        examples=[
            "gft-lite doctor",
            "gft-lite doctor --verbose",
        ],
    )  # fmt: skip
    add_verbosity(parser)
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    with show_imports():
        import torch  # noqa: F401
    from rich.console import Console

    from gft_lite.tools.doctor import CHECKS, all_required_pass, checks_table, run_checks
    from gft_lite.utils.progress import show_phase, stderr_console

    console = Console()
    with show_phase(stderr_console(), "doctor") as phase:
        numbers = {name: f"{n} of {len(CHECKS)}" for n, name in enumerate(CHECKS, start=1)}
        checks = run_checks(
            lambda name: setattr(phase, "text", f"doctor: check {numbers[name]}, {name}")
        )
    console.print(checks_table(checks))
    passed = all_required_pass(checks)
    verdict = "everything that training needs works" if passed else "see what failed above"
    console.print(verdict, style="green" if passed else "red")
    return DONE if passed else FAILED
