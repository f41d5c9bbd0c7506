"""`gft-lite distill`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gft_lite.cli.common import (
    DONE,
    FAILED,
    add_allow_code,
    add_output,
    add_recipe,
    add_verbosity,
    check_recipe_trust,
    show_imports,
)
from gft_lite.cli.parser import add_command
from gft_lite.utils.secrets import redact


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "distill", "have a teacher solve a recipe's problems", group="train",
        description="Samples a teacher's solutions of the recipe's problems, grades them by the"
        " recipe's reward, and writes a data set and the fragment of a recipe that "
        "trains on it. The same command continues after an interruption and repeats"
        " no request.",
        examples=[
            "gft-lite distill recipes/x.yaml --teacher https://host/v1 --model NAME",
            "gft-lite distill recipes/lab.yaml --teacher runs/gft --samples 3",
        ],
    )  # fmt: skip
    add_recipe(parser)
    parser.add_argument(
        "--teacher", required=True, metavar="URL|TARGET",
        help="an OpenAI-compatible server, its key in GFT_LITE_TEACHER_KEY (or OPENAI_API_KEY for "
        "OpenAI's own); or a model for this machine, named as in eval",
    )  # fmt: skip
    for flag, words in _SETTINGS_FLAGS.items():
        parser.add_argument(f"--{flag}", metavar=_KINDS.get(flag, "N"), help=words)
    add_output(parser, ".jsonl or .parquet (default: data/NAME-TEACHER.jsonl)", kind="file")
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run, again="the same command continues")


_KINDS = {"model": "NAME", "temperature": "T", "top-p": "P", "system": "TEXT",
          "timeout": "SECONDS", "price-in": "USD", "price-out": "USD",
          "column": "NAME"}  # fmt: skip
_SETTINGS_FLAGS = {
    "model": "the server's model, where it has several",
    "samples": "answers to each problem (default: 3)",
    "temperature": "default: 0.7",
    "top-p": "default: 1",
    "max-tokens": "of an answer (default: rollout.max_tokens)",
    "system": "the system prompt (default: data.prompt.system)",
    "limit": "take the first so many problems",
    "concurrency": "requests in flight (default: 8)",
    "timeout": "seconds for an answer of a server, retries included (default: 600)",
    "requests-per-minute": "at most so many",
    "price-in": "dollars per million prompt tokens, to show the cost",
    "price-out": "dollars per million answer tokens",
    "column": "the new column's name (default: teacher)",
}


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.cli.inputs import check_source, check_targets
    from gft_lite.distillation.teachers import TeacherSettings, is_endpoint
    from gft_lite.evaluation.targets import find_targets
    from gft_lite.recipe.schema import Recipe
    from gft_lite.recipe.sections import PolicySettings

    recipe = Recipe.load(options.recipe, options.overrides)
    names = {flag.replace("-", "_") for flag in _SETTINGS_FLAGS}
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    check_recipe_trust(options, recipe)
    check_source(recipe.data, "data")
    settings = TeacherSettings.from_tree(given)
    if not is_endpoint(options.teacher, settings):
        check_targets(find_targets([options.teacher], PolicySettings()))
    with show_imports():
        from gft_lite.distillation.pipeline import distill
    from rich.console import Console

    from gft_lite.distillation.console import summary_table
    from gft_lite.distillation.data_set import side_folder

    summary = distill(recipe, options.teacher, options.out, settings)
    Console().print(summary_table(summary))
    for reason, count in summary["failures"].items():
        print(f"failed: {count:,} times: {redact(reason)}")
    fragment = side_folder(Path(summary["file"])) / "data.yaml"
    print(f"distilled: {summary['file']}\nto train on it, extend {fragment}:\n")
    print(fragment.read_text(encoding="utf-8"), end="")
    return FAILED if summary["failed"] else DONE
