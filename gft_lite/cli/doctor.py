"""`gft-lite doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import DONE, FAILED


def add(commands: Any) -> None:
    """Tell argparse of the command."""
    words = "what works on this machine, and what to do about the rest"
    parser = commands.add_parser("doctor", help=words)
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from rich.console import Console

    from gft_lite.tools.doctor import examine, healthy, table

    console = Console()
    with console.status("doctor") as status:
        checks = examine(lambda name: status.update(f"doctor: {name}"))
    console.print(table(checks))
    well = healthy(checks)
    verdict = "everything that training needs works" if well else "see what failed above"
    console.print(verdict, style="green" if well else "red")
    return DONE if well else FAILED
