"""`gft-lite merge`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import (
    DONE,
    add_allow_code,
    add_verbose,
    check_model_trust,
    non_negative,
    output_path,
    show_imports,
)
from gft_lite.recipe.sections import PolicySettings


def add(commands: Any) -> None:
    """Add the command to the parser."""
    words = "merge a trained adapter into its unquantised base, and compare before and after"
    parser = commands.add_parser("merge", help=words)
    parser.add_argument("target", metavar="RUN", help="a run, RUN@step-N, or an adapter's folder")
    parser.add_argument(
        "--out",
        required=True,
        type=output_path("--out", "folder"),
        metavar="DIR",
        help="the merged model's folder",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"],
                        help="default: bfloat16")  # fmt: skip
    parser.add_argument("--limit", type=non_negative, metavar="NATS",
                        help="the largest mean change of a log-prob (default: 0.05)")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"],
                        help="default: cpu, which needs the memory of one such model")  # fmt: skip
    add_allow_code(parser)
    add_verbose(parser)
    parser.set_defaults(run=run, again="nothing was written")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    with show_imports():
        from gft_lite.evaluation.targets import find_targets
        from gft_lite.tools.merge import LIMIT, merge, next_commands
    if not options.allow_code:
        check_model_trust(find_targets([options.target], PolicySettings()))
    limit = LIMIT if options.limit is None else options.limit
    merge(options.target, options.out, limit=limit, dtype=options.dtype, device=options.device)
    print(f"model: {options.out}")
    for command in next_commands(options.out, options.dtype):
        print(f"  {command}")
    return DONE
