"""`gft-lite sweep`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import (
    DONE,
    FAILED,
    MAX_SEEDS,
    add_allow_code,
    add_output,
    add_overrides,
    add_verbosity,
    whole_number,
)
from gft_lite.cli.parser import add_command
from gft_lite.utils.errors import UserError


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "sweep", "a run at every point of a grid, with several seeds", group="compare",
        description="Trains a recipe at every point of a grid, at random points of it, or at "
        "points that Optuna proposes, and prints the results by setting. The same "
        "command continues after an interruption.",
        examples=[
            "gft-lite sweep recipes/sweeps/tau.yaml",
            "gft-lite sweep recipes/lab.yaml --grid optim.lr=1e-3,2e-3 --seeds 3",
            "gft-lite sweep recipes/lab.yaml --grid group=2:6,4:4 --dry-run",
        ],
    )  # fmt: skip
    parser.add_argument("recipe", help="a sweep file such as recipes/sweeps/tau.yaml, or a recipe")
    add_overrides(parser, "changes of every run")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="FIELD=V1,V2",
        help="objective.tau=0,0.5,1; group=6:2,4:4 is demonstrations:self; "
        "optim.lr={log: [1e-4, 1e-2]} with --random; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--seeds",
        type=whole_number(1, MAX_SEEDS),
        metavar="N",
        help="runs at each point (default: 1)",
    )
    parser.add_argument(
        "--random", type=whole_number(1, 10**5), metavar="N", help="draw so many points of the grid"
    )
    parser.add_argument("--search", type=whole_number(1, 10**5), metavar="N",
                        help="have Optuna propose so many points, one by one")  # fmt: skip
    parser.add_argument("--metric", metavar="SET/FIGURE",
                        help="of --search: test/pass@1 (default: the headline)")  # fmt: skip
    parser.add_argument("--minimize", action="store_true", help="--search minimizes it")
    parser.add_argument("--prune", action="store_true",
                        help="--search stops runs by their curves (needs eval.every)")  # fmt: skip
    parser.add_argument("--budget-hours", metavar="H",
                        help="shorten train.steps so that all runs take so long")  # fmt: skip
    parser.add_argument("--jobs", type=whole_number(1, 1024), metavar="N",
                        help="runs at a time (default: 1; with ray what fits)")  # fmt: skip
    parser.add_argument("--launcher", default="local", metavar="NAME", help="local or ray")
    parser.add_argument("--separate", action="store_true",
                        help="load the base and start the engine anew for every run")  # fmt: skip
    add_output(parser, "default: runs/sweeps/NAME")
    parser.add_argument("--dry-run", action="store_true", help="print the sweep's runs and stop")
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run, again="the same command continues")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.experiments.sweep_budget import describe_cost
    from gft_lite.experiments.sweep_config import Sweep, grid_override

    overrides = [*(f"overrides.{text}" for text in options.overrides),
                 *map(grid_override, options.grid)]  # fmt: skip
    for field in ("seeds", "random", "budget_hours"):
        if getattr(options, field) is not None:
            overrides.append(f"{field}={getattr(options, field)}")
    overrides += _search_overrides(options)
    plan = Sweep.load(options.recipe, overrides)
    if options.dry_run:
        print(plan.to_yaml(), end="")
        for trial in () if plan.search else plan.trials():
            print(f"# {trial.name}")
        for line in describe_cost(plan):
            print(f"# {line}")
        return DONE
    if not options.allow_code:
        from gft_lite.cli.trust import check_code_trust, named_code

        code = (line for trial in plan.trials() for line in named_code(trial.recipe))
        recipes = plan.model_dump()["grid"].get("recipe", [])
        check_code_trust(code, [options.recipe, plan.recipe, *recipes])
    from rich.console import Console

    from gft_lite.cli.inputs import check_inputs
    from gft_lite.experiments.sweep_results import results_by_settings
    from gft_lite.experiments.sweep_runner import check_launcher, sweep

    check_launcher(options.jobs, options.launcher)
    check_inputs(*(trial.recipe for trial in plan.trials()))
    console = Console()
    for line in describe_cost(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    folder = sweep(
        plan, options.out, jobs=options.jobs, launcher=options.launcher, share=not options.separate
    )
    results = folder.results()
    means = results_by_settings(results)
    console.print(means.title, style="bold", highlight=False)
    console.print(means.rich(console.width))
    failed = [trial for trial in results["trials"] if trial["state"] == "failed"]
    for trial in results["trials"]:
        if trial["state"] in ("failed", "stopped"):
            log = folder.path / trial["folder"] / "log.txt"
            how = "failed: " if trial["state"] == "failed" else ""
            console.print(f"{how}{trial['name']}: {trial['reason']} ({log})",
                          markup=False, soft_wrap=True)  # fmt: skip
    if found := results.get("search"):
        best = "best: no trial is done"
        if found["best"]:
            best = f"best: {found['best']}: {found['metric'] or 'headline'} {found['figure']:.4g}"
        console.print(best, markup=False, soft_wrap=True)
    console.print(f"sweep: {folder.path}", markup=False, soft_wrap=True)
    return FAILED if failed else DONE


def _search_overrides(options: argparse.Namespace) -> list[str]:
    """The overrides of --search, --metric, --minimize and --prune."""
    given = {"trials": options.search, "metric": options.metric,
             "mode": "min" if options.minimize else None,
             "prune": options.prune or None}  # fmt: skip
    if options.search is None and any(given.values()):
        name = next(n for n in ("metric", "minimize", "prune") if getattr(options, n))
        raise UserError([f"--{name}: must be given with --search N, got no --search."])
    return [f"search.{name}={value}" for name, value in given.items() if value is not None]
