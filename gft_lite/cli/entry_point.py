"""The entry point of `gft-lite`: parses arguments, runs a command, maps errors to exit codes."""

from __future__ import annotations

import argparse
import errno
import io
import os
import select
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from gft_lite.cli import (
    audit,
    chat,
    completion,
    distill,
    doctor,
    evaluate,
    groups,
    init,
    lab,
    merge,
    methods,
    plan,
    push,
    referee,
    report,
    sweep,
    train,
)
from gft_lite.cli.common import FAILED, INTERRUPTED, WRONG_INPUT
from gft_lite.cli.parser import Parser
from gft_lite.utils.cpu import wait_without_spinning
from gft_lite.utils.errors import RewardError, UserError, short_repr
from gft_lite.utils.files import is_disk_full
from gft_lite.utils.library_output import VERBOSE, hide_library_messages
from gft_lite.utils.secrets import redact
from gft_lite.version import __version__

COMMANDS = (
    init,
    train,
    plan,
    distill,
    groups,
    evaluate,
    sweep,
    referee,
    lab,
    methods,
    report,
    chat,
    merge,
    push,
    doctor,
    audit,
    completion,
)
_AGAIN = "run the command again"
# Only the paths that users give can be the cause of these.
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES,
                errno.EROFS)  # fmt: skip
# Set by `accelerate launch` for each process, or read by huggingface_hub when it is imported.
_NUMBERS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0, "HF_HUB_ETAG_TIMEOUT": 0}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 2: the user's input is wrong; 1: any other failure; 130: interrupted. argparse raises
    SystemExit after --help and --version.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Not every locale has every character.
    options = argparse.Namespace()
    try:
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        code = _run(options)
        if sys.stdout is not None:  # As Python sets it where the descriptor is closed.
            sys.stdout.flush()
        return code
    # A RewardError comes from the user's reward function while it runs.
    except (UserError, RewardError) as error:
        print(redact(str(error)), file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print(f"interrupted; {getattr(options, 'again', _AGAIN)}", file=sys.stderr)
        return INTERRUPTED
    except _OutputClosed:
        return FAILED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_closed(1):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes to it again at its end.
            return FAILED
        if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename:
            path = short_repr(os.fspath(error.filename))
            print(redact(f"path: must be usable, got {path} ({error.strerror}). Choose another."),
                  file=sys.stderr)  # fmt: skip
            return WRONG_INPUT
        # Developers set the variable to see the traceback.
        if os.environ.get("GFT_LITE_DEBUG"):
            raise
        text = f"{type(error).__name__}: {error}"
        again = getattr(options, "again", _AGAIN)
        if is_disk_full(error) and again not in text:
            text += f". The disk is full: make room; {again}."
        print(redact(text), file=sys.stderr)
        print("GFT_LITE_DEBUG=1 shows where.", file=sys.stderr)
        return FAILED


class _OutputClosed(Exception):
    """The reader of the standard output, such as `head`, has ended."""


def _is_closed(descriptor: int) -> bool:
    """True if it is a pipe that nothing reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(options: argparse.Namespace) -> int:
    """Run the command. Raises: RuntimeError for a SystemExit, which would set the exit code."""
    if getattr(options, "verbose", False):
        os.environ[VERBOSE] = "1"
    hide_library_messages()
    wait_without_spinning()
    try:
        with _progress(options):
            return options.run(options)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # As rich ends a program.
            raise _OutputClosed from error
        reason = f"code that the command called ended the program by SystemExit: {error}"
        raise RuntimeError(reason) from error


def _progress(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Hides progress with --quiet."""
    if not getattr(options, "quiet", False):
        return nullcontext()
    from gft_lite.utils.progress import hide_progress

    return hide_progress()


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises: UserError for arguments and environment variables that are not valid."""
    for text in arguments:
        # Bytes that are not UTF-8 arrive as lone surrogates, which cannot be written to files.
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError([f"arguments: must be UTF-8, got {short_repr(text)}. Rename the file."])
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse accepts positional arguments in one block only; overrides may follow flags.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.leaf(arguments).option_error((unknown or rest)[0])
    if rest:
        options.overrides = [*options.overrides, *rest]
    numbers = {name: _number(name, low) for name, low in _NUMBERS.items()}
    if numbers["WORLD_SIZE"] > 1 and options.run is not train.run:
        parser.error("only train runs in several processes")
    options.parser = parser
    return options


def _number(name: str, low: int) -> int:
    """The value of an environment variable, `low` if it is not set. Raises: UserError."""
    text = os.environ.get(name, str(low))
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        rule = f"must be a whole number and at least {low}"
        raise UserError([f"{name}: {rule}, got {short_repr(text)}. Unset the variable."])
    return value


def make_parser() -> Parser:
    """The parser of all commands, made without side effects."""
    parser = Parser(
        prog="gft-lite",
        description="Group Fine-Tuning of language models on one GPU.",
        epilog="gft-lite COMMAND --help has the options of a command, and examples. "
        "Exit codes: 0 done, 2 wrong input, 1 a failure, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"gft-lite {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
