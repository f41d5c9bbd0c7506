"""`gft-lite init`, and the guesses of `gft-lite train --data`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gft_lite.cli.common import DONE, add_output, add_overrides
from gft_lite.cli.parser import add_command
from gft_lite.utils.errors import UserError

if TYPE_CHECKING:
    from gft_lite.tools.new_recipe import Draft


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "init", "write a recipe for your data and your model", group="train",
        description="Looks at a file, a folder or a hub data set, guesses columns, prompt, method, "
        "reward and lengths, plans memory, and writes a recipe with the reason beside every "
        "value. Doubts are printed. Any guess can be replaced by key=value.",
        examples=[
            "gft-lite init questions.jsonl --model Qwen/Qwen2.5-1.5B-Instruct --gpu 12GiB",
            "gft-lite init chats.parquet --model FOLDER --out chats.yaml",
            "gft-lite init qa.csv --model M data.columns.answer=final method=grpo",
            "gft-lite init openai/gsm8k --model M data.config=main",
        ],
    )  # fmt: skip
    words = "a JSONL, JSON, CSV or parquet file, a folder of them, or a hub data set"
    parser.add_argument("data", metavar="DATA", help=words)
    words = "values in place of guesses, such as data.columns.answer=final"
    add_overrides(parser, words)
    parser.add_argument("--model", required=True, help="the folder or hub id of the base model")
    words = "the card to plan for: 12GiB, 4090 (default: this machine's GPU, or else its RAM)"
    parser.add_argument("--gpu", metavar="SIZE|NAME", help=words)
    words = "the recipe to write (default: recipe.yaml)"
    add_output(parser, words, kind="file", default="recipe.yaml")
    parser.add_argument("--force", action="store_true", help="overwrite an existing recipe")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.tools.new_recipe import draft_recipe, recipe_text
    from gft_lite.utils.files import write_text_atomic

    out = Path(options.out)
    if out.exists() and not options.force:
        rule = "must be a file that does not exist yet"
        raise UserError([f"--out: {rule}, got {options.out!r}. Add --force to overwrite it."])
    draft = draft_recipe(options.data, options.model, options.gpu, options.overrides)
    words = ["gft-lite init", options.data, "--model", options.model, *options.overrides]
    write_text_atomic(out, recipe_text(draft, " ".join(words)))
    print_draft(draft, sys.stdout)
    print(f"\nwrote {out}. Edit it, or repeat the command with --force and key=value. Next:")
    gpu = f" --gpu {options.gpu}" if options.gpu else ""
    for line in (f"plan {out}{gpu}", f"train {out}"):
        print(f"  gft-lite {line}")
    return DONE


def draft_for_training(options: argparse.Namespace) -> Draft:
    """The draft of `gft-lite train --data`, printed to stderr by one process. Raises: UserError."""
    from gft_lite.tools.new_recipe import draft_recipe

    if options.model is None:
        raise UserError(["--model: must be given with --data, got none. Give a folder or hub id."])
    draft = draft_recipe(options.data, options.model, None, options.overrides)
    if not options.quiet and os.environ.get("RANK", "0") == "0":
        print_draft(draft, sys.stderr)
    return draft


def print_draft(draft: Draft, file: TextIO) -> None:
    """Print every guess with its reason, the doubts and the memory."""
    from gft_lite.tools.new_recipe import as_yaml, memory_line, printable

    found = draft.detected
    columns = ", ".join(found.columns)
    print(printable(f"{draft.source}: {found.rows:,} rows with {columns}") + "\n", file=file)
    for guess in draft.guesses:
        if guess.value == "auto" and guess.field != "optim.lr":
            continue
        line = f"{guess.field}={as_yaml(guess.value)}"
        reason = f"  # {printable(guess.reason)}" if guess.reason else ""
        gap = "\n   " if len(line) + len(reason) > 80 and reason else ""
        print(f"{line}{gap}{reason}", file=file)
    memory = memory_line(draft.plan) if draft.plan else f"not planned: {draft.unplanned}"
    print(f"\nmemory: {memory}", file=file)
    for doubt in draft.doubts:
        print(printable(f"check: {doubt}"), file=file)
