"""The plan of a referee as text: what is run, and what it takes in responses, time and disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from gft_lite.data.sources import open_source
from gft_lite.experiments.lab_bases import lab_seed
from gft_lite.experiments.referee_plan import DIAL_TRIALS, STAGED_TRIALS, TUNE_SAMPLES, RefereePlan
from gft_lite.experiments.sweep_results import SweepFolder
from gft_lite.experiments.verdict import points
from gft_lite.planning.memory import MemoryModel
from gft_lite.planning.model_shape import find_shape
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import read_json
from gft_lite.utils.memory import GIB
from gft_lite.utils.paired_difference import LEVEL, PairedDifference
from gft_lite.utils.progress import format_duration
from gft_lite.utils.tables import Table

# Standard deviations of the difference of two methods between seeds of a base, between bases and
# between problems, for the power of a design: of 24 methods on six bases in examples/referee_lab.md
# the medians are .035 (that of pairs of seeds over .6745), .096 and .17.
_SEED_SPREAD, _BASE_SPREAD, _PROBLEM_SPREAD = 0.04, 0.1, 0.2
_ADAPTER_BYTES = 4  # Of a parameter; the optimiser's state has twice as many.


def describe(plan: RefereePlan) -> dict[str, str]:
    """What is run, as text by name."""
    options, tune = plan.options, plan.tune_set
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    texts = {
        "budget": f"{plan.budget:,} {options.equal} a run; {plan.responses_per_step} responses a "
        "step, as near as the size of a group allows",
        "bases": ", ".join(plan.bases),
        "seeds": f"{options.seeds} from {plan.recipe.seed + 1} on",
        "evaluation": f"{', '.join(plan.sets)}; {plan.recipe.eval.samples} samples a problem",
    }
    if len(plan.rates) == 1:
        texts["rates"] = f"{rates} for all methods, not tuned"
    else:
        texts |= {
            "rates": f"{rates} for each method",
            "tuning": f"{DIAL_TRIALS} further trials for each method at its best rate: other values"
            " of its dial, or rates beyond or between the others; for each method with stages"
            f" {STAGED_TRIALS}"
            f" trials of the last stage's rate; seed {plan.recipe.seed} on {plan.bases[0]}",
            "tuning set": f"{tune.source} {tune.split}, {tune.problems or 'all'} problems, "
            f"{min(TUNE_SAMPLES, plan.recipe.eval.samples)} samples each",
        }
    return texts


def method_table(plan: RefereePlan) -> Table:
    """A row for each method: its group, its steps, and the runs that tune and compare it."""
    rows = []
    for contender in plan.contenders.values():
        name = contender.name
        parts = contender.stages or (name,)
        recipe = Recipe.from_tree(plan.tree(name, plan.example_settings(name), "main"))
        recipes = [recipe.stage(i) for i in range(len(recipe.stages))] or [recipe]
        group = [f"{r.group.expert}+{r.group.teacher}+{r.group.self}" for r in recipes]
        steps = [str(r.steps or "-") for r in recipes]
        total, tuning = plan.trajectories(name), plan.tuning_runs(name)
        values = ", ".join(f"{value:g}" for value in plan.dial_values(name))
        dial = f"{contender.dial.parameter} {values}" if contender.dial and tuning else "-"
        rows.append((
            name, " > ".join(group), " > ".join(str(plan.problems_per_step(p)) for p in parts),
            " > ".join(steps), "-" if total is None else f"{total:,}", dial, str(tuning),
            str(plan.main_runs(name)),
        ))  # fmt: skip
    header = ("method", "group", "problems a step", "steps", "responses", "dial, besides",
              "runs to tune", "to compare")  # fmt: skip
    return Table("Methods (group: expert + teacher + self)", header, tuple(rows))


def plan_lines(plan: RefereePlan, out: Path) -> list[str]:
    """The design, and what it takes in all, a line each."""
    runs = sum(plan.runs.values())
    lines = [f"{name}: {text}" for name, text in describe(plan).items()]
    lines.append(f"runs: {plan.runs['tune']:,} to tune, {plan.runs['main']:,} to compare")
    if plan.options.equal == "trajectories":
        lines.append(f"responses: about {runs * plan.budget:,} in all, besides evaluations")
    left = runs - len(list(_finished(out)))
    if left < runs:
        lines.append(f"finished: {runs - left:,} of {runs:,} runs in {out}")
    if failed := failed_before(plan, out):
        lines.append(failed)
    seeds = [str(seed) for base in plan.bases if (seed := lab_seed(base))]
    if seeds:
        lines.append(f"pretraining: the lab's bases of the seeds {', '.join(seeds)}, minutes each")
    lines.append(f"power: {power(plan)}")
    lines.append(f"time: {_time(plan, out)}")
    lines.append(f"disk: {_disk(plan)}")
    return lines


def power(plan: RefereePlan) -> str:
    """Which differences the design finds, if runs and problems differ as on the lab."""
    seeds, bases = plan.options.seeds, len(plan.bases)
    if seeds == bases == 1:
        return "with one run of each method, other seeds are not covered. Give --seeds 5 or more"
    runs, unit, spread = seeds, "seeds", _SEED_SPREAD
    if bases > 1:
        runs, unit, spread = bases, "bases", _BASE_SPREAD
    found, more = (_detectable(plan, each, spread) for each in (runs, 2 * runs))
    alone = "" if bases == 1 else " (a base counts once, however many seeds it has)"
    size = (
        "no difference is found reliably" if found >= 1
        else f"differences of about {points(found, signed=False)} points are found 4 times in 5"
    )  # fmt: skip
    return (
        f"with {runs} {unit}{alone}, {size}; with {2 * runs}, those of "
        f"{points(more, signed=False)}. It assumes that differences spread by {100 * spread:g} "
        f"points between {unit} and {100 * _PROBLEM_SPREAD:g} between problems, as on the lab; the "
        "verdict has those of your data"
    )


def _detectable(plan: RefereePlan, runs: int, spread: float) -> float:
    """The difference that is found on the headline set with so many runs of each method."""
    of_runs, of_problems, problems = spread**2 / runs, 0.0, 2
    if count := _headline_problems(plan):
        problems, of_problems = max(count, 2), _PROBLEM_SPREAD**2 / count
    design = PairedDifference(0.0, of_runs, of_problems, of_problems, runs, problems)
    return float(design.detectable((1 - LEVEL) / (len(plan.methods) - 1)))


def _headline_problems(plan: RefereePlan) -> int | None:
    """The problems of the headline set; None if that is not known before it is read."""
    name, settings = next(iter(plan.sets.items()))
    try:
        rows = sum(part.count for part in open_source(settings, f"eval.sets.{name}"))
    except RecipeError:  # The first run says what is wrong with it.
        return settings.problems
    rows = max(rows - settings.skip, 1)
    return min(rows, settings.problems or rows)


def failed_before(plan: RefereePlan, out: Path) -> str | None:
    """The trials of an earlier start that failed, which are run again, as a line."""
    names = []
    for part in plan.runs:
        if (out / part / "results.json").exists():
            results = SweepFolder(out / part).results()["trials"]
            names += [f"{part}/{t['folder']}" for t in results if t["state"] == "failed"]
    if not names:
        return None
    what = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
    return (
        f"failed before: {what}; run again, from the last checkpoint. To leave out a method that "
        "always fails, choose a new --out"
    )


def _finished(out: Path, part: str = "*") -> Iterator[Path]:
    return out.glob(f"{part}/trials/*/summary.json")


def _seconds(summary: Path) -> float:
    """The time that a run took. Raises: UserError for a damaged file."""
    rule, advice = "must be the summary of a finished run", "Remove the run: it is then run again."
    return read_json(summary, lambda value: float(value["seconds"]["total"]), rule, advice)


def _time(plan: RefereePlan, out: Path) -> str:
    """The time of the runs that are left, by the finished ones in the folder."""
    seconds = {part: [_seconds(file) for file in _finished(out, part)] for part in plan.runs}
    known = [value for values in seconds.values() for value in values]
    if not known:
        return "not known before the first run is finished"
    left = sum(
        max(0, runs - len(seconds[part])) * fmean(seconds[part] or known)
        for part, runs in plan.runs.items()
    )
    if not left:
        return "no run is left"
    known_by = f"by {len(known):,} finished runs"
    return f"about {format_duration(left)} of runs are left ({known_by}), one at a time"


def _disk(plan: RefereePlan) -> str:
    """Adapters and checkpoints of all runs; logs, metrics and groups are not counted."""
    try:
        shape = find_shape(plan.recipe.policy.model)
    except RecipeError:
        return "not known for this model"
    recipe, size = plan.recipe, 0
    adapter = _ADAPTER_BYTES * MemoryModel(shape, recipe, "cpu").lora_parameters
    for contender in plan.contenders.values():
        runs = plan.tuning_runs(contender.name) + plan.main_runs(contender.name)
        stages = max(1, len(contender.stages))
        size += runs * stages * adapter * (1 + 3 * recipe.checkpoint.keep)
    return (
        f"at most {size / GIB:.2f} GiB of adapters and checkpoints (checkpoint.keep "
        f"{recipe.checkpoint.keep}), besides logs and groups"
    )
