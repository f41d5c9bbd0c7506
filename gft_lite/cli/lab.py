"""`gft-lite lab`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import (
    DONE,
    FAILED,
    MAX_SEEDS,
    add_output,
    add_overrides,
    add_verbosity,
    whole_number,
)
from gft_lite.cli.parser import add_command


def add(commands: Any) -> None:
    """Add the command to the parser."""
    lab = add_command(
        commands, "lab", "experiments with the built-in task and its tiny model", group="compare",
        description="Experiments with the built-in task and its tiny model, on a CPU and "
        "without a download.",
        examples=[
            "gft-lite lab compare --seeds 3",
            "gft-lite lab study",
        ],
    )  # fmt: skip
    lab_commands = lab.add_subparsers(metavar="COMMAND", required=True)
    _add_compare(lab_commands)
    _add_study(lab_commands)


def _add_compare(commands: Any) -> None:
    compare = add_command(
        commands, "compare", "train GFT, SFT and GRPO, and print one table",
        description="Trains the lab's recipe by several methods and prints accuracy, retention "
        "and KL of each, as means over the seeds. A run takes about a minute on two"
        " cores.",
        examples=[
            "gft-lite lab compare",
            "gft-lite lab compare --methods gft,dft --seeds 3",
        ],
    )  # fmt: skip
    add_overrides(compare, "changes of every run")
    compare.add_argument("--methods", default="gft,sft,grpo", metavar="A,B",
                         help="default: gft,sft,grpo")  # fmt: skip
    compare.add_argument(
        "--seeds",
        type=whole_number(1, MAX_SEEDS),
        default=1,
        metavar="N",
        help="runs per method (default: 1)",
    )
    add_output(compare, "default: runs/compare", default="runs/compare")
    add_verbosity(compare)
    compare.set_defaults(run=_compare)


def _add_study(commands: Any) -> None:
    study = add_command(
        commands, "study", "test the paper's findings; about half an hour",
        description="Tests 17 findings of the paper on three tiny bases, by a decision rule "
        "fixed before the runs, and writes a page of results. The same command "
        "continues after an interruption.",
        examples=[
            "gft-lite lab study",
            "gft-lite lab study --seeds 5 --jobs 4 --report study.md",
        ],
    )  # fmt: skip
    add_overrides(study, "changes of every run")
    study.add_argument("--seeds", type=whole_number(1, MAX_SEEDS), default=2, metavar="N",
                       help="runs of each setting on each of three bases (default: 2)")  # fmt: skip
    study.add_argument("--jobs", type=whole_number(1, 1024), default=2, metavar="N",
                       help="runs at a time (default: 2)")  # fmt: skip
    add_output(study, "default: runs/study", default="runs/study")
    page = "examples/lab_study.md"
    add_output(study, f"default: {page}", flag="--report", kind="file", default=page)
    add_verbosity(study)
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
