"""Shared by the commands: exit codes, common arguments, argument types, checks of trust."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar

from gft_lite.utils.errors import UserError, short_repr
from gft_lite.utils.files import check_output_path

if TYPE_CHECKING:
    from gft_lite.evaluation.targets import Target
    from gft_lite.recipe.schema import Recipe

N = TypeVar("N", int, float)

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
MAX_SEEDS = 1000  # Of a sweep or study, each of them a run.
MAX_TOKENS = 1 << 20  # Of an answer.


# --- arguments -------------------------------------------------------------------------------


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the arguments RECIPE and key=value."""
    words = "a recipe file, or a shipped one such as recipes/lab.yaml"
    parser.add_argument("recipe", metavar="RECIPE", help=words)
    add_overrides(parser)


def add_overrides(
    parser: argparse.ArgumentParser,
    words: str = "changes of the recipe, such as optim.lr=1e-5 group.self=6",
) -> None:
    """Add the arguments key=value, with a help text."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=words)


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Add the flag --allow-code."""
    words = "run code that a file from outside the working directory names"
    parser.add_argument("--allow-code", action="store_true", help=words)


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add the flags --verbose and --quiet, of which one can be given."""
    group = parser.add_mutually_exclusive_group()
    words = "show all messages of libraries such as transformers and vLLM"
    group.add_argument("--verbose", action="store_true", help=words)
    words = "show results and errors only, without progress"
    group.add_argument("--quiet", action="store_true", help=words)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low` to `high`."""
    rule = f"must be a whole number from {low:,} to {high:,}"
    return lambda text: _number(text, int, lambda value: low <= value <= high, rule)


def non_negative(text: str) -> float:
    """The type of an argument that is a finite number and at least 0."""
    rule = "must be a number and at least 0"
    return _number(text, float, lambda value: 0 <= value < math.inf, rule)


def _number(text: str, convert: Callable[[str], N], accepts: Callable[[N], bool], rule: str) -> N:
    try:
        value = convert(text)
        accepted = accepts(value)
    except ValueError:
        accepted = False
    if not accepted:
        raise argparse.ArgumentTypeError(f"{rule}, got {short_repr(text)}")
    return value


def add_output(
    parser: argparse.ArgumentParser, words: str, *, flag: str = "--out",
    kind: Literal["folder", "file"] = "folder", default: str | None = None, required: bool = False,
) -> None:  # fmt: skip
    """Add the argument `flag`, a folder or file that the command writes, with a help text."""

    def path(text: str) -> str:
        check_output_path(text, flag, kind)
        return text

    parser.add_argument(
        flag, type=path, metavar="DIR" if kind == "folder" else "FILE", help=words,
        default=default, required=required,
    )  # fmt: skip


def run_folder(text: str) -> str:
    """The type of an argument that is the folder of a run or sweep."""
    if not os.path.isdir(text):  # Also False for a name that is too long, or a circle of links.
        rule = "must be the folder of a run or of a sweep"
        raise UserError([f"RUN: {rule}, got {short_repr(text)}."])
    return text


# --- imports ---------------------------------------------------------------------------------


@contextmanager
def show_imports() -> Iterator[None]:
    """Show that torch is being imported, for the length of a `with`; once for all ranks."""
    if "torch" in sys.modules or os.environ.get("RANK", "0") != "0":
        yield
        return

    from gft_lite.utils.progress import show_phase, stderr_console

    with show_phase(stderr_console(), "importing libraries"):
        yield


# --- trust -----------------------------------------------------------------------------------


def check_recipe_trust(options: argparse.Namespace, recipe: Recipe) -> None:
    """Raises: UserError if a recipe from elsewhere names code and --allow-code is not given."""
    if not options.allow_code:
        from gft_lite.cli.trust import check_code_trust, named_code

        check_code_trust(named_code(recipe), [options.recipe])


def check_model_trust(targets: Sequence[Target]) -> None:
    """Raises: UserError if the recipe of a run from elsewhere trusts the code of a model."""
    from gft_lite.cli.trust import check_code_trust, remote_code

    for target in targets:
        if target.run:
            check_code_trust(remote_code(target.policy), [target.run / "recipe.yaml"])
