"""`gft-lite completion`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import DONE
from gft_lite.cli.parser import add_command
from gft_lite.utils.errors import UserError

SHELLS = ("bash", "zsh", "fish")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "completion", "print the completion script of a shell", group="check",
        description="Prints a script that completes commands, options and file names on Tab. The "
        "script itself is static, so that completion takes no time. It needs the package shtab.",
        examples=[
            'eval "$(gft-lite completion bash)"     # in ~/.bashrc',
            'eval "$(gft-lite completion zsh)"      # in ~/.zshrc, after compinit',
            "gft-lite completion fish > ~/.config/fish/completions/gft-lite.fish",
        ],
    )  # fmt: skip
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        import shtab
    except ImportError:
        rule = "must be installed for completion, got no such package"
        raise UserError([f'shtab: {rule}. pip install "gft-lite[completion]".']) from None
    print(shtab.complete(options.parser, options.shell))
    return DONE
