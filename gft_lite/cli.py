"""The command line. Heavy rooms are entered only by the command that needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from gft_lite import __version__
from gft_lite.recipe import Recipe, RecipeError
from gft_lite.rewards import RewardError

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 done, 2 the user's input is wrong, 1 we failed, 130 interrupted."""
    options, rest = _parser().parse_known_args(arguments)
    # argparse takes positionals in one block only; overrides may stand after flags too.
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray:
        _parser().error(f"unrecognized arguments: {' '.join(stray)}")
    if hasattr(options, "overrides"):
        options.overrides += rest
    # Traceback or not is the choice of who debugs, not of who types a recipe.
    debug = bool(os.environ.get("GFT_LITE_DEBUG"))
    try:
        return options.run(options)
    except RecipeError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return WRONG_INPUT
    except RewardError as error:  # The user's reward function, while it ran.
        print(error, file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        again = getattr(options, "again", "continue with --resume")
        print(f"interrupted; {again}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        print("GFT_LITE_DEBUG=1 shows where.", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gft-lite", description="Group Fine-Tuning of language models on one GPU."
    )
    parser.add_argument("--version", action="version", version=f"gft-lite {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train as a recipe says")
    train.add_argument("recipe", help="a recipe file, or a shipped one: recipes/lab.yaml")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="optim.lr=1e-5 group.self=6"
    )
    train.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/NAME)")
    train.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    train.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    train.set_defaults(run=_train)

    _add_eval(commands)

    methods = commands.add_parser("methods", help="the table of training methods")
    methods.set_defaults(run=_methods)

    lab = commands.add_parser("lab", help="the built-in laboratory")
    lab_commands = lab.add_subparsers(metavar="COMMAND", required=True)
    compare = lab_commands.add_parser("compare", help="GFT, SFT and GRPO side by side")
    compare.add_argument("overrides", nargs="*", metavar="key=value")
    compare.add_argument("--methods", default="gft,sft,grpo", help="default: gft,sft,grpo")
    compare.add_argument("--seeds", type=int, default=1, metavar="N", help="runs per method")
    compare.add_argument("--out", metavar="DIR", default="runs/compare")
    compare.set_defaults(run=_compare)
    return parser


def _add_eval(commands: Any) -> None:
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
    parser.add_argument("--out", metavar="DIR",
                        help="default: evals/SUITE, or eval/SUITE in the one run")  # fmt: skip
    parser.add_argument("--regrade", action="store_true",
                        help="grade the responses in --out again, without a model")  # fmt: skip
    for flag, key in _SUITE_FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="N", help=f"the same as {key}=N")
    parser.set_defaults(run=_eval, overrides=[], again="the same command continues")


_SUITE_FLAGS = {
    "samples": "samples", "temperature": "rollout.temperature", "max-tokens": "rollout.max_tokens",
    "k": "k", "engine": "rollout.engine", "limit": "limit", "seed": "seed",
}  # fmt: skip


def _eval(options: argparse.Namespace) -> int:
    targets = [t for t in options.targets if "=" not in t or os.path.exists(t)]
    overrides = [t for t in options.targets if t not in targets] + options.overrides
    for flag, key in _SUITE_FLAGS.items():
        value = getattr(options, flag.replace("-", "_"))
        if value is not None:
            overrides.append(f"{key}=[{value}]" if flag == "k" else f"{key}={value}")
    from gft_lite.suites import Suite

    suite = Suite.load(options.suite, overrides)
    from rich.console import Console

    from gft_lite.evaluate import evaluate_suite
    from gft_lite.tables import tables

    results = evaluate_suite(
        suite, targets, options.out, data_dir=options.data_dir, regrade=options.regrade
    )
    console = Console()
    for table in tables(results):
        console.print(table.title, style="bold", highlight=False)
        console.print(table.rich(console.width))
    print(f"{results['sampled']:,} responses sampled, {results['reused']:,} reused")
    print(f"results: {results['folder']}")
    return DONE


def _train(options: argparse.Namespace) -> int:
    recipe = Recipe.load(options.recipe, options.overrides)
    if options.dry_run:
        print(recipe.to_yaml(), end="")
        return DONE
    from rich.console import Console

    from gft_lite.runlog import results_table
    from gft_lite.train import train

    run = train(recipe, options.out, resume=options.resume)
    summary = run.summary()
    console = Console()
    figures = {"base": summary["base"], "trained": summary["trained"]}
    console.print(results_table(figures, f"{recipe.name}: {recipe.method}"))
    console.print(f"run: {run.path}", markup=False, soft_wrap=True)
    return DONE


_LEGEND = """
E, T, S    expert, teacher and self rows of each problem; - where the method takes none
p, rho     the token's probability; rho = p / p at the rollout; sg stops the gradient
clip(rho)  rho within 1 - objective.clip_low and 1 + objective.clip_high
A, C(p)    the group's advantage; p below objective.tau, else 1
KL         KL(reference || policy) over the whole vocabulary
Numbers are defaults: group, objective and optim.lr in the recipe change them.\
"""


def _methods(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from gft_lite.objective import METHODS

    table = Table("method", "E", "T", "S", "loss of a token", "needs", "reduction", "lr",
                  "arXiv", box=None, padding=(0, 1, 0, 0))  # fmt: skip
    for name, method in METHODS.items():
        recipe = Recipe.from_tree({"method": name})
        rows = [str(getattr(recipe.group, s)) if s in method.sources else "-"
                for s in ("expert", "teacher", "self")]  # fmt: skip
        reduction, lr = recipe.objective.reduction, f"{recipe.optim.lr:g}"
        table.add_row(name, *rows, method.formula, ", ".join(method.needs) or "-", reduction, lr,
                      method.source.removeprefix("arXiv "))  # fmt: skip
    console = Console()
    console.print(table)
    console.print(_LEGEND, highlight=False)
    return DONE


def _compare(options: argparse.Namespace) -> int:
    from gft_lite.lab.compare import compare

    compare(options.methods.split(","), options.seeds, options.out, options.overrides)
    return DONE
