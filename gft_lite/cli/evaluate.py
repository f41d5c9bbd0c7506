"""`gft-lite eval`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from gft_lite.cli.common import (
    DONE,
    add_allow_code,
    add_verbose,
    check_model_trust,
    output_path,
    show_imports,
)


def add(commands: Any) -> None:
    """Add the command to the parser."""
    words = "evaluate models, adapters, runs or their checkpoints, and compare them"
    parser = commands.add_parser("eval", help=words)
    parser.add_argument(
        "targets", nargs="+", metavar="TARGET",
        help="lab, a hub id, the folder of a model, an adapter or a run; RUN@step-N and RUN@all "
        "are its checkpoints; key=value changes policy., rollout., reward. and the suite",
    )  # fmt: skip
    parser.add_argument("--suite", required=True, metavar="NAME|FILE",
                        help="paper, retention, diversity, lab, or your own YAML")  # fmt: skip
    parser.add_argument("--data-dir", metavar="DIR", help="NAME.jsonl there replaces the hub")
    parser.add_argument("--out", type=output_path("--out", "folder"), metavar="DIR",
                        help="default: evals/SUITE, or eval/SUITE in the one run")  # fmt: skip
    parser.add_argument("--regrade", action="store_true",
                        help="grade the responses in --out again, without a model")  # fmt: skip
    for flag, key in _SUITE_FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="N", help=f"the same as {key}=N")
    add_allow_code(parser)
    add_verbose(parser)
    parser.set_defaults(run=run, overrides=[], again="the same command continues")


_SUITE_FLAGS = {
    "samples": "samples", "temperature": "rollout.temperature", "max-tokens": "rollout.max_tokens",
    "k": "k", "engine": "rollout.engine", "limit": "limit", "seed": "seed",
}  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    targets = [t for t in options.targets if "=" not in t or os.path.exists(t)]
    overrides = [t for t in options.targets if t not in targets] + options.overrides
    for flag, key in _SUITE_FLAGS.items():
        value = getattr(options, flag.replace("-", "_"))
        if value is not None:
            overrides.append(f"{key}=[{value}]" if flag == "k" else f"{key}={value}")
    from gft_lite.evaluation.suites import Suite

    suite = Suite.load(options.suite, overrides)
    with show_imports():
        from gft_lite.evaluation.evaluator import evaluate
        from gft_lite.evaluation.targets import find_targets
    if not options.allow_code:
        from gft_lite.cli.trust import check_code_trust, named_code

        check_code_trust(named_code(suite), filter(os.path.isfile, [options.suite]))
        check_model_trust(find_targets(targets, suite.policy))
    from rich.console import Console

    from gft_lite.evaluation.tables import tables

    results = evaluate(
        suite, targets, options.out, data_dir=options.data_dir, regrade=options.regrade
    )
    console = Console()
    for table in tables(results):
        console.print(table.title, style="bold", highlight=False)
        console.print(table.rich(console.width))
    print(f"{results['sampled']:,} responses sampled, {results['reused']:,} reused")
    print(f"results: {results['folder']}")
    return DONE
