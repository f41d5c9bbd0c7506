"""`gft-lite eval`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gft_lite.cli.common import (
    DONE,
    add_allow_code,
    add_output,
    add_verbosity,
    check_model_trust,
    show_imports,
)
from gft_lite.cli.parser import add_command
from gft_lite.utils.errors import UserError

if TYPE_CHECKING:
    from gft_lite.evaluation.harness import HarnessSettings
    from gft_lite.evaluation.suites import Suite
    from gft_lite.evaluation.targets import Target
    from gft_lite.recipe.schema import Recipe


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "eval", "evaluate models, adapters and runs, and compare them", group="compare",
        description="Samples and grades responses to the problems of a suite, and writes "
        "accuracy, pass@k, paired differences with intervals and KL to the base. "
        "The same command continues after an interruption; responses are kept and "
        "can be graded again.",
        examples=[
            "gft-lite eval runs/lab lab --suite lab",
            "gft-lite eval runs/lab@all --suite lab              # every checkpoint",
            "gft-lite eval runs/gft runs/sft --suite paper --data-dir benchmarks",
            "gft-lite eval runs/gft Qwen/Qwen2.5-1.5B --data test.jsonl",
            "gft-lite eval runs/gft --harness gsm8k,mmlu_stem",
        ],
    )  # fmt: skip
    parser.add_argument(
        "targets", nargs="+", metavar="TARGET",
        help="lab, a hub id, the folder of a model, an adapter or a run; RUN@step-N and RUN@all "
        "are its checkpoints; key=value changes policy., rollout., reward. and the suite",
    )  # fmt: skip
    parser.add_argument("--suite", metavar="NAME|FILE",
                        help="paper, retention, diversity, lab, or your own YAML")  # fmt: skip
    parser.add_argument(
        "--data", metavar="DATA", help="in place of a suite: a file or hub data set, by the "
        "columns, prompt, reward and sampling of the first run",
    )  # fmt: skip
    parser.add_argument("--harness", metavar="TASK,TASK",
                        help="tasks of lm-evaluation-harness, alone or beside these")  # fmt: skip
    parser.add_argument("--harness-include", metavar="DIR", help="your own task files")
    parser.add_argument("--harness-chat", action="store_true",
                        help="apply the model's chat template to its tasks")  # fmt: skip
    parser.add_argument("--data-dir", metavar="DIR", help="NAME.jsonl there replaces the hub")
    add_output(parser, "default: evals/SUITE, or eval/SUITE in the one run")
    parser.add_argument("--regrade", action="store_true",
                        help="grade the responses in --out again, without a model")  # fmt: skip
    for flag, key in _SUITE_FLAGS.items():
        kind = {"temperature": "T", "k": "N,N", "engine": "NAME"}.get(flag, "N")
        parser.add_argument(f"--{flag}", metavar=kind, help=f"the same as {key}={kind}")
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run, overrides=[], again="the same command continues")


_SUITE_FLAGS = {
    "samples": "samples", "temperature": "rollout.temperature", "max-tokens": "rollout.max_tokens",
    "k": "k", "engine": "rollout.engine", "limit": "limit", "seed": "seed",
}  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    if options.suite and options.data:
        raise UserError(["--data: must be given without --suite."])
    if not (options.suite or options.data or options.harness):
        rule = "must be given, or --data or --harness"
        raise UserError([f"--suite: {rule}. For example --suite lab."])
    targets = [t for t in options.targets if "=" not in t or os.path.exists(t)]
    overrides = [t for t in options.targets if t not in targets] + options.overrides
    for flag, key in _SUITE_FLAGS.items():
        value = getattr(options, flag.replace("-", "_"))
        if value is not None:
            overrides.append(f"{key}=[{value}]" if flag == "k" else f"{key}={value}")
    from gft_lite.cli.inputs import check_folder, check_source, check_targets
    from gft_lite.evaluation.suites import Suite
    from gft_lite.evaluation.targets import find_targets

    check_folder(options.data_dir, "--data-dir")
    check_folder(options.harness_include, "--harness-include")
    if options.data:
        suite = Suite.of_data(options.data, _first_recipe(targets), overrides)
        for name, benchmark in suite.definitions.items():
            check_source(benchmark, f"definitions.{name}")
    else:  # Without a suite, overrides of `policy.` and --limit apply to the harness.
        suite = Suite.load(options.suite or "lab", overrides)
    found = find_targets(targets, suite.policy)
    if not options.allow_code:
        from gft_lite.cli.trust import check_code_trust, check_task_trust, named_code

        check_code_trust(named_code(suite), filter(os.path.isfile, [options.suite or ""]))
        check_model_trust(found)
        if options.harness_include:
            check_task_trust(options.harness_include)
    if not options.regrade:
        check_targets(found)
    harness = _harness_settings(options, suite.limit) if options.harness else None
    tasks = _load_tasks(harness) if harness else None  # Before anything is sampled.
    folder = _evaluate(options, suite, found) if options.suite or options.data else None
    if harness:
        _run_harness(harness, tasks, found, folder or _harness_folder(options, found))
    return DONE


def _first_recipe(targets: Sequence[str]) -> Recipe:
    """The recipe of the first run among the targets. Raises: UserError without one."""
    from gft_lite.evaluation.targets import find_targets
    from gft_lite.recipe.schema import Recipe
    from gft_lite.recipe.sections import PolicySettings

    for target in find_targets(targets, PolicySettings()):
        if target.run:
            return Recipe.load(target.run / "recipe.yaml")
    raise UserError(["--data: must have a run among the targets, whose prompt and reward it takes. "
                     "Name one, or write a suite for --suite."])  # fmt: skip


def _evaluate(options: argparse.Namespace, suite: Suite, targets: Sequence[Target]) -> Path:
    """Run the suite and print its results; returns the folder."""
    from rich.console import Console

    with show_imports():
        from gft_lite.evaluation.evaluator import evaluate
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
    return Path(results["folder"])


def _harness_settings(options: argparse.Namespace, limit: int | None) -> HarnessSettings:
    from gft_lite.evaluation.harness import HarnessSettings

    tasks = tuple(filter(None, map(str.strip, options.harness.split(","))))
    return HarnessSettings(tasks, options.harness_include, limit, options.harness_chat)


def _harness_folder(options: argparse.Namespace, targets: Sequence[Target]) -> Path:
    """--out, by default `eval/harness` of the one run or `evals/harness`."""
    runs = {target.run for target in targets}
    run = runs.pop() if len(runs) == 1 else None
    return Path(options.out or (run / "eval" if run else Path("evals")) / "harness")


def _load_tasks(settings: HarnessSettings) -> Any:
    from gft_lite.evaluation.harness import load_tasks
    from gft_lite.utils.progress import show_phase, stderr_console

    with show_phase(stderr_console(), "reading the tasks of lm-evaluation-harness"):
        return load_tasks(settings)


def _run_harness(
    settings: HarnessSettings, tasks: Any, targets: Sequence[Target], folder: Path
) -> None:
    from rich.console import Console

    from gft_lite.evaluation.harness import add_to_results, harness_table, run_harness
    from gft_lite.utils.progress import stderr_console

    results = run_harness(settings, tasks, targets, folder, stderr_console())
    add_to_results(folder, results)
    console, table = Console(), harness_table(results)
    console.print(table.title, style="bold", highlight=False)
    console.print(table.rich(console.width))
    print(f"results: {folder}")
