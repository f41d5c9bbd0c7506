"""`gft-lite distill`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gft_lite.cli.common import DONE, FAILED, add_allow_code, add_recipe, refuse_foreign_recipe
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.secrets import redact


def add(commands: Any) -> None:
    """Tell argparse of the command."""
    parser = commands.add_parser("distill", help="have a teacher solve a recipe's problems")
    add_recipe(parser)
    parser.add_argument(
        "--teacher", required=True, metavar="URL|TARGET",
        help="an OpenAI-compatible server, its key in GFT_LITE_TEACHER_KEY (or OPENAI_API_KEY for "
        "OpenAI's own); or a model for this machine, named as in eval",
    )  # fmt: skip
    for flag, words in _ASKING_FLAGS.items():
        kind = "TEXT" if flag in ("model", "system", "column") else "N"
        parser.add_argument(f"--{flag}", metavar=kind, help=words)
    parser.add_argument("--out", metavar="FILE",
                        help=".jsonl or .parquet (default: data/NAME-TEACHER.jsonl)")  # fmt: skip
    add_allow_code(parser)
    parser.set_defaults(run=run, again="the same command continues")


_ASKING_FLAGS = {
    "model": "the server's model, where it has several",
    "samples": "answers to each problem (default: 3)",
    "temperature": "default: 0.7",
    "top-p": "default: 1",
    "max-tokens": "of an answer (default: rollout.max_tokens)",
    "system": "what the teacher is told first (default: data.prompt.system)",
    "limit": "take the first so many problems",
    "concurrency": "requests in flight (default: 8)",
    "requests-per-minute": "at most so many",
    "price-in": "dollars per million prompt tokens, to show the cost",
    "price-out": "dollars per million answer tokens",
    "column": "the new column's name (default: teacher)",
}


def run(options: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    recipe = Recipe.load(options.recipe, options.overrides)
    given = {flag.replace("-", "_") for flag in _ASKING_FLAGS}
    asked = {name: value for name in given if (value := getattr(options, name)) is not None}
    refuse_foreign_recipe(options, recipe)
    from rich.console import Console

    from gft_lite.distillation.console import table
    from gft_lite.distillation.pipeline import beside, distill
    from gft_lite.distillation.teachers import TeacherSettings

    summary = distill(recipe, options.teacher, options.out, TeacherSettings.from_tree(asked))
    Console().print(table(summary))
    for reason, count in summary["failures"].items():
        print(f"failed: {count:,} times: {redact(reason)}")
    fragment = beside(Path(summary["file"])) / "data.yaml"
    print(f"distilled: {summary['file']}\nto train on it, extend {fragment}:\n")
    print(fragment.read_text(encoding="utf-8"), end="")
    return FAILED if summary["failed"] else DONE
