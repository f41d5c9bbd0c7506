"""The entry point of `gft-lite`: arguments, commands, and errors as exit codes."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from gft_lite.cli import (
    chat,
    distill,
    doctor,
    evaluate,
    groups,
    lab,
    merge,
    methods,
    plan,
    report,
    sweep,
    train,
)
from gft_lite.cli.common import FAILED, INTERRUPTED, WRONG_INPUT
from gft_lite.rewards.base import RewardError
from gft_lite.utils.errors import UserError
from gft_lite.utils.secrets import redact
from gft_lite.version import __version__

COMMANDS = (
    train,
    evaluate,
    plan,
    sweep,
    report,
    distill,
    groups,
    merge,
    chat,
    doctor,
    methods,
    lab,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 done, 2 the user's input is wrong, 1 we failed, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Not every locale has every character.
    options, rest = _parser().parse_known_args(arguments)
    # argparse takes positionals in one block only; overrides may stand after flags too.
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray:
        _parser().error(f"unrecognized arguments: {' '.join(stray)}")
    if hasattr(options, "overrides"):
        options.overrides += rest
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and options.run is not train.run:
        _parser().error("only train runs in several processes")
    # Traceback or not is the choice of who debugs, not of who types a recipe.
    debug = bool(os.environ.get("GFT_LITE_DEBUG"))
    try:
        return options.run(options)
    except (UserError, RewardError) as error:  # The latter while the user's function ran.
        print(redact(str(error)), file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        again = getattr(options, "again", "continue with --resume")
        print(f"interrupted; {again}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        print(redact(f"{type(error).__name__}: {error}"), file=sys.stderr)
        print("GFT_LITE_DEBUG=1 shows where.", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gft-lite", description="Group Fine-Tuning of language models on one GPU."
    )
    parser.add_argument("--version", action="version", version=f"gft-lite {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
