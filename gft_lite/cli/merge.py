"""`gft-lite merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gft_lite.cli.common import (
    DONE,
    add_allow_code,
    add_output,
    add_verbosity,
    check_model_trust,
    non_negative,
    show_imports,
)
from gft_lite.cli.parser import add_command


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "merge", "merge an adapter into its unquantised base",
        group="use and share a model",
        description="Merges a trained adapter into its unquantised base, compares log-probs "
        "with the unmerged policy, and writes nothing if they differ by more than "
        "--limit. Prints the commands that serve the model or convert it to GGUF.",
        examples=[
            "gft-lite merge runs/gft --out merged",
            "gft-lite merge runs/gft@step-40 --out merged --dtype float32",
        ],
    )  # fmt: skip
    parser.add_argument("target", metavar="RUN", help="a run, RUN@step-N, or an adapter's folder")
    add_output(parser, "the merged model's folder", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"],
                        help="default: bfloat16")  # fmt: skip
    parser.add_argument("--limit", type=non_negative, metavar="NATS",
                        help="the largest mean change of a log-prob (default: 0.05)")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"],
                        help="default: cpu, which needs the memory of one such model")  # fmt: skip
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run, again="nothing was written")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.cli.inputs import check_targets
    from gft_lite.evaluation.targets import find_adapter
    from gft_lite.utils.files import check_new_folder

    check_new_folder(Path(options.out), "--out")
    found = [find_adapter(options.target)]
    if not options.allow_code:
        check_model_trust(found)
    check_targets(found)
    with show_imports():
        from gft_lite.tools.merge import LIMIT, merge, next_commands
    limit = LIMIT if options.limit is None else options.limit
    merge(options.target, options.out, limit=limit, dtype=options.dtype, device=options.device)
    print(f"model: {options.out}")
    for command in next_commands(options.out, options.dtype):
        print(f"  {command}")
    return DONE
