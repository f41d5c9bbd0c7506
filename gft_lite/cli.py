"""The command line. Heavy rooms are entered only by the command that needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gft_lite import __version__
from gft_lite.recipe import Recipe, RecipeError
from gft_lite.rewards import RewardError
from gft_lite.secret import redact

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
    except (RecipeError, RewardError) as error:  # The latter while the user's function ran.
        print(redact(str(error)), file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        again = getattr(options, "again", "continue with --resume")
        print(f"interrupted; {again}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        print(redact(f"{type(error).__name__}: {error}"), file=sys.stderr)
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
    _add_allow_code(train)
    train.set_defaults(run=_train)

    _add_eval(commands)

    _add_plan(commands)

    _add_sweep(commands)

    _add_report(commands)

    words = "what works on this machine, and what to do about the rest"
    doctor = commands.add_parser("doctor", help=words)
    doctor.set_defaults(run=_doctor)

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
    words = "the paper's findings, tested: about half an hour on two cores, once"
    study = lab_commands.add_parser("study", help=words)
    study.add_argument("overrides", nargs="*", metavar="key=value", help="changes every run")
    study.add_argument("--seeds", type=int, default=2, metavar="N",
                       help="runs of each setting on each of three bases (default: 2)")  # fmt: skip
    study.add_argument("--jobs", type=int, default=2, metavar="N",
                       help="runs at a time (default: 2)")  # fmt: skip
    study.add_argument("--out", metavar="DIR", default="runs/study", help="default: runs/study")
    study.add_argument("--report", metavar="FILE", default="examples/lab_study.md",
                       help="default: examples/lab_study.md")  # fmt: skip
    study.set_defaults(run=_study, again="the same command continues")
    return parser


def _add_allow_code(parser: argparse.ArgumentParser) -> None:
    words = "run code that a file from outside the working directory names"
    parser.add_argument("--allow-code", action="store_true", help=words)


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
    _add_allow_code(parser)
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
    if not options.allow_code:
        from gft_lite.targets import find_targets
        from gft_lite.trust import named_code, refuse_foreign_code, remote_code

        refuse_foreign_code(named_code(suite), filter(os.path.isfile, [options.suite]))
        for target in find_targets(targets, suite.policy):
            if target.run:
                refuse_foreign_code(remote_code(target.policy), [target.run / "recipe.yaml"])
    from rich.console import Console

    from gft_lite.evaluate import evaluate
    from gft_lite.tables import tables

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


def _add_sweep(commands: Any) -> None:
    parser = commands.add_parser("sweep", help="a run at every point of a grid, with several seeds")
    parser.add_argument("recipe", help="a sweep file such as recipes/sweeps/tau.yaml, or a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes every run")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="FIELD=V1,V2",
        help="objective.tau=0,0.5,1; group=6:2,4:4 is demonstrations:self; "
        "optim.lr={log: [1e-4, 1e-2]} with --random; may be given several times",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, metavar="N", help="runs at each point (default: 1)")
    parser.add_argument("--random", type=int, metavar="N", help="draw so many points of the grid")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="runs at a time (default: 1; with ray what fits)")  # fmt: skip
    parser.add_argument("--launcher", default="local", metavar="NAME", help="local or ray")
    parser.add_argument("--out", metavar="DIR", help="default: runs/sweeps/NAME")
    parser.add_argument("--dry-run", action="store_true", help="print the sweep's runs and stop")
    _add_allow_code(parser)
    parser.set_defaults(run=_sweep, again="the same command continues")


def _sweep(options: argparse.Namespace) -> int:
    from gft_lite.sweep_grid import Sweep, grid_override

    overrides = [*(f"overrides.{text}" for text in options.overrides),
                 *map(grid_override, options.grid)]  # fmt: skip
    for field in ("seeds", "random"):
        if getattr(options, field) is not None:
            overrides.append(f"{field}={getattr(options, field)}")
    plan = Sweep.load(options.recipe, overrides)
    if options.dry_run:
        print(plan.to_yaml(), end="")
        for trial in plan.trials():
            print(f"# {trial.name}")
        return DONE
    if not options.allow_code:
        from gft_lite.trust import named_code, refuse_foreign_code

        code = (line for trial in plan.trials() for line in named_code(trial.recipe))
        recipes = plan.model_dump()["grid"].get("recipe", [])
        refuse_foreign_code(code, [options.recipe, plan.recipe, *recipes])
    from rich.console import Console

    from gft_lite.sweep import sweep, table

    folder = sweep(plan, options.out, jobs=options.jobs, launcher=options.launcher)
    results = folder.results()
    console = Console()
    means = table(results)
    console.print(means.title, style="bold", highlight=False)
    console.print(means.rich(console.width))
    failed = [trial for trial in results["trials"] if trial["state"] == "failed"]
    for trial in failed:
        log = folder.path / trial["folder"] / "log.txt"
        console.print(f"failed: {trial['name']}: {trial['reason']} ({log})",
                      markup=False, soft_wrap=True)  # fmt: skip
    console.print(f"sweep: {folder.path}", markup=False, soft_wrap=True)
    return FAILED if failed else DONE


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="runs and sweeps as one page to read and browse")
    parser.add_argument("folders", nargs="+", metavar="RUN_OR_SWEEP", help="their folders")
    parser.add_argument("--out", metavar="FILE", default="report.html",
                        help="default: report.html")  # fmt: skip
    parser.add_argument("--plots", metavar="DIR", help="every plot as SVG and PNG as well")
    parser.add_argument("--groups", type=int, default=8, metavar="N",
                        help="groups shown of each step shown (default: 8)")  # fmt: skip
    parser.add_argument("--no-tokens", dest="tokens", action="store_false",
                        help="load no model: groups without p of each token")  # fmt: skip
    _add_allow_code(parser)
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from gft_lite.report import write_report

    if options.tokens and not options.allow_code:
        from gft_lite.trust import refuse_foreign_code, remote_code

        for file in (f for folder in options.folders for f in Path(folder).rglob("recipe.yaml")):
            refuse_foreign_code(remote_code(Recipe.load(file).policy), [file])
    page = write_report(
        options.folders, options.out, plots=options.plots, tokens=options.tokens,
        groups=options.groups,
    )  # fmt: skip
    print(f"report: {page}")
    return DONE


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser("plan", help="how much memory a recipe takes, and what fits")
    parser.add_argument("recipe", help="a recipe file, or a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", metavar="SIZE|NAME", help="8GiB, rtx4090, h200 (default: the "
                        "smallest card on which the recipe fits)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    recipe = Recipe.load(options.recipe, options.overrides)
    from gft_lite.plan import CARDS, plan_for, what_would_fit

    plan, on_cards = plan_for(recipe, options.gpu)
    if options.json:
        import json

        found = plan.to_json() | {"cards": [p.to_json() for p in on_cards]}
        print(json.dumps(found, indent=2))
        return DONE
    from rich.console import Console

    from gft_lite import plan_table

    console = Console()
    console.print(plan_table.headline(plan.job), highlight=False)
    for table in (
        plan_table.components(plan, options.gpu),
        plan_table.settings(plan),
        plan_table.cards(on_cards, CARDS),
    ):
        console.print(table.title, style="bold", highlight=False)
        console.print(table.rich(console.width))
    for problem in plan.problems:
        console.print(f"does not fit: {problem}", highlight=False)
    if plan.problems:
        fitting = what_would_fit(plan.job, plan.limit)
        console.print(f"would fit: {fitting}", highlight=False, soft_wrap=True)
    return DONE


def _train(options: argparse.Namespace) -> int:
    recipe = Recipe.load(options.recipe, options.overrides)
    if options.dry_run:
        print(recipe.to_yaml(), end="")
        return DONE
    if not options.allow_code:
        from gft_lite.trust import named_code, refuse_foreign_code

        refuse_foreign_code(named_code(recipe), [options.recipe])
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


def _doctor(_: argparse.Namespace) -> int:
    from rich.console import Console

    from gft_lite.doctor import examine, healthy, table

    console = Console()
    with console.status("doctor") as status:
        checks = examine(lambda name: status.update(f"doctor: {name}"))
    console.print(table(checks))
    well = healthy(checks)
    verdict = "everything that training needs works" if well else "see what failed above"
    console.print(verdict, style="green" if well else "red")
    return DONE if well else FAILED


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


def _study(options: argparse.Namespace) -> int:
    from gft_lite.lab.study import Design, study
    from gft_lite.lab.study_page import write_page

    design = Design(seeds=options.seeds)
    results = study(options.out, design, jobs=options.jobs, overrides=options.overrides)
    print(f"study: {write_page(results, options.report)}")
    return FAILED if results.failed else DONE
