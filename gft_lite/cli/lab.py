"""`gft-lite lab`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import DONE, FAILED, MAX_SEEDS, add_verbose, output_path, whole_number


def add(commands: Any) -> None:
    """Add the command to the parser."""
    lab = commands.add_parser("lab", help="the built-in laboratory")
    lab_commands = lab.add_subparsers(metavar="COMMAND", required=True)
    compare = lab_commands.add_parser("compare", help="GFT, SFT and GRPO side by side")
    compare.add_argument("overrides", nargs="*", metavar="key=value")
    compare.add_argument("--methods", default="gft,sft,grpo", help="default: gft,sft,grpo")
    compare.add_argument(
        "--seeds", type=whole_number(1, MAX_SEEDS), default=1, metavar="N", help="runs per method"
    )
    compare.add_argument(
        "--out", type=output_path("--out", "folder"), metavar="DIR", default="runs/compare"
    )
    add_verbose(compare)
    compare.set_defaults(run=_compare)
    words = "the paper's findings, tested: about half an hour on two cores, once"
    study = lab_commands.add_parser("study", help=words)
    study.add_argument("overrides", nargs="*", metavar="key=value", help="changes every run")
    study.add_argument("--seeds", type=whole_number(1, MAX_SEEDS), default=2, metavar="N",
                       help="runs of each setting on each of three bases (default: 2)")  # fmt: skip
    study.add_argument("--jobs", type=whole_number(1, 1024), default=2, metavar="N",
                       help="runs at a time (default: 2)")  # fmt: skip
    study.add_argument(
        "--out",
        type=output_path("--out", "folder"),
        metavar="DIR",
        default="runs/study",
        help="default: runs/study",
    )
    study.add_argument("--report", type=output_path("--report", "file"), metavar="FILE",
                       default="examples/lab_study.md",
                       help="default: examples/lab_study.md")  # fmt: skip
    add_verbose(study)
    study.set_defaults(run=_study, again="the same command continues")


def _compare(options: argparse.Namespace) -> int:
    from gft_lite.experiments.compare_methods import compare

    compare(options.methods.split(","), options.seeds, options.out, options.overrides)
    return DONE


def _study(options: argparse.Namespace) -> int:
    from gft_lite.experiments.lab_study import Design, study
    from gft_lite.experiments.study_page import write_page

    design = Design(seeds=options.seeds)
    results = study(options.out, design, jobs=options.jobs, overrides=options.overrides)
    print(f"study: {write_page(results, options.report)}")
    return FAILED if results.failed else DONE
