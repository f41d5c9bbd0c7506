"""What a sweep takes, before its first run: memory by the plan, hours by a few steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gft_lite.experiments.sweep_config import Sweep, Trial
from gft_lite.experiments.sweep_results import SweepFolder
from gft_lite.planning.planner import plan_for
from gft_lite.recipe.loader import merge
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import base_inputs
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.memory import GIB
from gft_lite.utils.progress import format_duration

PROBE = "probe"  # The folder, beside the trials, of the run whose pace is measured.
PROBE_STEPS = 3  # The first is left out: it compiles and allocates.
LEAST_STEPS = 5  # Of a run; with fewer, there is nothing to compare.
_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a run: outside of steps and evaluations, of a step, and of an evaluation."""

    start: float
    step: float
    evaluation: float

    @classmethod
    def measured(cls, run: RunFolder) -> Pace:
        """The pace of a finished run of at least two steps."""
        seconds, recipe = run.summary()["seconds"], Recipe.load(run.path / "recipe.yaml")
        steps = [sum(metrics["seconds"].values()) for metrics in run.metrics()]
        evaluations = 1 + _evaluations(recipe, len(steps))
        start = max(0.0, seconds["total"] - seconds["eval"] - sum(steps))
        return cls(start, fmean(steps[1:]), seconds["eval"] / evaluations)

    def seconds(self, trials: Sequence[Trial], steps: int) -> float:
        """Of all trials, one after another, each of so many steps; equal bases count once."""
        bases = len({base_inputs(trial.recipe) for trial in trials})
        evaluations = bases + sum(_evaluations(trial.recipe, steps) for trial in trials)
        runs = len(trials) * (self.start + steps * self.step)
        return runs + evaluations * self.evaluation


def describe_cost(plan: Sweep) -> list[str]:
    """What is known before anything is run, a line each: the memory, and what decides the time."""
    trials = plan.trials()
    trial = _largest(trials)
    lines = []
    try:
        found = plan_for(trial.recipe, None)
        room = f"{found.peak / GIB:.1f} GiB of {found.limit / GIB:.1f} on {found.where}"
        lines.append(f"memory: {room} at the peak, planned for {trial.name}")
        lines += [f"does not fit: {problem}" for problem in found.problems]
    except RecipeError:
        lines.append("memory: not known for this model")
    if plan.budget_hours is not None:
        _own_steps(trials)
        probe = f"{PROBE_STEPS} steps of {trial.name} measure how long a step takes"
        lines.append(f"time: {plan.budget_hours:g} h in all; {probe}")
    return lines


def probe_trial(plan: Sweep) -> Trial:
    """The trial with the most own samples in its groups, cut to a few steps."""
    trials = plan.trials()
    _own_steps(trials)
    trial = _largest(trials)
    train = trial.recipe.train.model_copy(update={"steps": PROBE_STEPS})
    return Trial(PROBE, trial.settings, trial.recipe.model_copy(update={"train": train}))


def within_budget(plan: Sweep, probe: RunFolder) -> tuple[Sweep, str]:
    """The sweep with the most steps that fit its hours at the pace of the probe, and a text.

    Raises: UserError if fewer than `LEAST_STEPS` fit.
    """
    trials, pace = plan.trials(), Pace.measured(probe)
    own, hours = _own_steps(trials), plan.budget_hours or 0.0
    least = min(own, LEAST_STEPS)
    fitting = (n for n in range(own, least - 1, -1) if pace.seconds(trials, n) <= hours * _HOUR)
    steps = next(fitting, None)
    if steps is None:
        needed = pace.seconds(trials, least) / _HOUR
        rule = f"budget_hours: must be at least {needed:.2g} for {least} steps in each of "
        rule += f"{len(trials)} runs, got {hours:g}"
        raise UserError([f"{rule}. Give more hours, or fewer values or seeds."])
    text = (
        f"a step takes {format_duration(pace.step)}, an evaluation "
        f"{format_duration(pace.evaluation)}, the rest of a run {format_duration(pace.start)} "
        f"({probe.path}); {steps} of {own} steps in each of {len(trials)} runs take about "
        f"{format_duration(pace.seconds(trials, steps))} of {format_duration(hours * _HOUR)}"
    )
    return _with_steps(plan, steps), text


def earlier_start(plan: Sweep, folder: SweepFolder) -> Sweep | None:
    """The sweep with the steps of an earlier start in the folder, if that was the same sweep."""
    file = folder.path / "sweep.yaml"
    if not file.exists():
        return None
    saved = Sweep.load(file)
    train: Any = saved.overrides.get("train")
    same = isinstance(train, dict) and "steps" in train
    return saved if same and _with_steps(plan, train["steps"]) == saved else None


def _with_steps(plan: Sweep, steps: int) -> Sweep:
    overrides = merge(plan.overrides, {"train": {"steps": steps}})
    return plan.model_copy(update={"overrides": overrides})


def _own_steps(trials: Sequence[Trial]) -> int:
    """The steps of every trial. Raises: RecipeError unless `train.steps` decides them."""
    recipes = [trial.recipe for trial in trials]
    steps = {recipe.train.steps for recipe in recipes}
    staged = any(recipe.stages for recipe in recipes)
    if staged or len(steps) > 1 or any(r.steps != r.train.steps for r in recipes):
        got = "stages" if staged else "a budget" if len(steps) == 1 else f"steps {sorted(steps)}"
        rule = "budget_hours: must be of runs whose length is one train.steps"
        raise RecipeError([f"{rule}, got {got}. Leave out budget_hours."])
    return steps.pop()


def _largest(trials: Sequence[Trial]) -> Trial:
    """The first trial with the most own samples in a group, which is the slowest as a rule."""
    return max(trials, key=lambda trial: trial.recipe.group.self)


def _evaluations(recipe: Recipe, steps: int) -> int:
    """Of the trained policy, in a run of so many steps; one while training counts as a whole."""
    every = recipe.eval.every
    return 1 + (steps // every if every else 0)
