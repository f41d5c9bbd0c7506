"""`gft-lite referee`: methods tuned with equal effort, trained with equal budgets, and compared.

The runs are those of two ordinary sweeps in the folder: `tune`, on the first base with the recipe's
seed, and `main`, on all bases with the seeds after it. Their recipes are in `recipes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from gft_lite.experiments.lab_bases import lab_base, lab_seed, make_lab_bases
from gft_lite.experiments.launchers import LAUNCHERS, Launcher
from gft_lite.experiments.outcomes import Comparison, Failure, TuningPoint
from gft_lite.experiments.referee_costs import describe, failed_before
from gft_lite.experiments.referee_data import check_data
from gft_lite.experiments.referee_folder import check_same_plan
from gft_lite.experiments.referee_methods import RATE, Settings
from gft_lite.experiments.referee_plan import DIAL_TRIALS, Part, RefereePlan
from gft_lite.experiments.referee_results import environment, outcome
from gft_lite.experiments.sweep_config import Sweep
from gft_lite.experiments.sweep_runner import Span, check_launcher, sweep
from gft_lite.experiments.tuning import further_rates
from gft_lite.recipe.loader import Dumper
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.files import check_output_path, lock_folder, write_text_atomic
from gft_lite.utils.progress import stderr_console


@dataclass(frozen=True, slots=True)
class Trial:
    """A method with settings; `field` is the one that tuning varies by this trial."""

    method: str
    field: str
    settings: Settings


@dataclass
class _Referee:
    """A referee at work: its trials so far, and what failed."""

    plan: RefereePlan
    out: Path
    run_sweep: Callable[..., Any]
    trials: list[Trial] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)  # On the tuning set, by recipe file.
    failures: list[Failure] = field(default_factory=list)

    def tune(self) -> dict[str, Settings]:
        """The chosen settings of each method of which a run succeeded."""
        plan, rates = self.plan, self.plan.rates
        if len(rates) == 1:
            single: dict[str, Settings] = {
                c.name: plan.settings_at(c.name, rates[0]) for c in plan.single
            }
            return single | {c.name: plan.staged_settings(c.name, single) for c in plan.staged}
        self._try(Trial(c.name, RATE, plan.settings_at(c.name, rate))
                  for c in plan.single for rate in rates)  # fmt: skip
        best = {c.name: s for c in plan.single if (s := self._best(c.name))}
        self._try(
            trial for name, settings in best.items() for trial in self._further(name, settings)
        )
        chosen = {name: self._best(name) or {} for name in best}
        staged = [c for c in plan.staged if all(stage in chosen for stage in c.stages)]
        self._try(
            Trial(c.name, RATE, settings | {RATE: settings[RATE] * factor})
            for c in staged
            for settings in [plan.staged_settings(c.name, chosen)]
            for factor in (0.5, 1.0, 2.0)
        )
        return {c.name: s for c in plan.contenders.values() if (s := self._best(c.name))}

    def _further(self, name: str, best: Settings) -> list[Trial]:
        """Trials beside those of the rates: of the dial's other values, or of further rates."""
        contender, values = self.plan.contenders[name], self.plan.dial_values(name)
        trials = [
            Trial(name, contender.dial_field, {**best, **self.plan.dial_settings(name, value)})
            for value in values
        ]
        rates = further_rates(self.plan.rates, best[RATE])
        trials += [Trial(name, RATE, {**best, RATE: rate}) for rate in rates]
        return trials[:DIAL_TRIALS]

    def _best(self, name: str) -> Settings | None:
        """The settings with the highest score; of equal ones, those tried first."""
        tried = [t for t in self.trials if t.method == name and self._score(t) is not None]
        return max(tried, key=lambda t: self._score(t) or 0.0).settings if tried else None

    def _score(self, trial: Trial) -> float | None:
        return self.scores.get(self.plan.stem(trial.method, trial.settings))

    def _try(self, trials: Iterable[Trial]) -> None:
        """Run trials besides those that were run before, and record their scores."""
        self.trials += trials
        results = self.run_part("tune", [(t.method, t.settings) for t in self.trials])
        self.scores = {
            result["settings"]["recipe"]: result["summary"]["trained"]["pass@1"]
            for result in results
            if result["summary"]
        }

    def run_part(self, part: Part, runs: Sequence[tuple[str, Settings]]) -> list[dict[str, Any]]:
        """The results of the trials of a sweep, each with its `method` and `base`."""
        plan = self.plan
        names = {plan.stem(name, settings): name for name, settings in runs}
        files = [self._write(part, name, settings) for name, settings in runs]
        if not files:
            return []
        main = part == "main"
        given = plan.options.bases if main else plan.options.bases[:1]
        bases = {"policy.model": [*map(self._model, given)]} if given else {}
        tree = {
            "name": part,
            "recipe": files[0],
            "grid": {"recipe": files, **bases},
            "seeds": plan.options.seeds if main else 1,
        }
        span = Span(plan.runs["tune"] if main else 0, sum(plan.runs.values()))
        folder = self.run_sweep(Sweep.from_tree(tree), self.out / part, span=span)
        results = folder.results()["trials"]
        labels = {self._model(base): base for base in plan.bases}
        for result in results:
            model = result["settings"].get("policy.model")
            result["base"] = labels.get(model, plan.bases[0])
            result["method"] = names[result["settings"]["recipe"]]
        self.failures = [f for f in self.failures if f.part != part] + [
            Failure(r["method"], part, f"{part}/{r['folder']}", str(r["reason"]))
            for r in results
            if not r["summary"]
        ]
        return results

    def make_bases(self, jobs: int, console: Console) -> None:
        """Pretrain the bases of the laboratory that are not there yet."""
        seeds = [seed for base in self.plan.bases if (seed := lab_seed(base)) is not None]
        make_lab_bases(seeds, self._bases, jobs, console)

    def _model(self, base: str) -> str:
        seed = lab_seed(base)
        return base if seed is None else lab_base(seed, self._bases)

    @property
    def _bases(self) -> Path:
        return self.out / "bases"

    def _write(self, part: Part, name: str, settings: Settings) -> str:
        """Write a recipe file; returns its path."""
        file = self.out / "recipes" / part / f"{self.plan.stem(name, settings)}.yaml"
        text = yaml.dump(self.plan.tree(name, settings, part), Dumper=Dumper, sort_keys=False)
        write_text_atomic(file, text)
        return str(file.resolve())

    def tuning_points(self, chosen: Mapping[str, Settings]) -> tuple[TuningPoint, ...]:
        """Everything that was tried, with its score."""
        return tuple(
            TuningPoint(t.method, t.field, t.settings, self._score(t),
                        chosen.get(t.method) == t.settings)
            for t in self.trials
        )  # fmt: skip

    def comparison(
        self, chosen: Mapping[str, Settings], results: Sequence[Mapping[str, Any]]
    ) -> Comparison:
        """The comparison by the results of the sweep `main`."""
        plan = self.plan
        headline, *retention = plan.sets
        finished = [result for result in results if result["summary"]]
        recipes = {
            name: Recipe.from_tree(plan.tree(name, chosen[name], "main")).to_yaml()
            for name in plan.methods
            if name in chosen
        }
        return Comparison(
            name=plan.recipe.name,
            methods=plan.methods,
            against=plan.against,
            headline=headline,
            retention=tuple(retention),
            margin=plan.options.margin,
            outcomes=tuple(outcome(self.out, r, chosen[r["method"]]) for r in finished),
            tuning=self.tuning_points(chosen),
            failures=(*self.failures, *_untuned(plan, chosen)),
            design={**describe(plan), **environment()},
            recipes=recipes,
        )


def referee(
    plan: RefereePlan, out: str | Path, *, jobs: int | None = None, launcher: str = "local",
    share: bool = True, console: Console | None = None,
) -> Comparison:  # fmt: skip
    """Run everything of the plan that is not finished, and return the comparison.

    `jobs`, `launcher` and `share` are those of a sweep; all sweeps use the same processes.

    Raises: UserError for data that can't be compared on, or the folder of another comparison;
    KeyboardInterrupt after all runs have stopped.
    """
    check_output_path(out)
    check_launcher(jobs, launcher)
    console = console or stderr_console()
    with ExitStack() as stack:
        stack.enter_context(lock_folder(Path(out)))

        @cache
        def workers() -> Launcher:
            started = LAUNCHERS[launcher](jobs, share)
            stack.callback(started.close)
            return started

        run_sweep = partial(sweep, console=console, workers=workers)
        check_same_plan(plan, Path(out))
        check_data(plan)
        if failed := failed_before(plan, Path(out)):
            console.print(failed, markup=False, soft_wrap=True)
        work = _Referee(plan, Path(out), run_sweep)
        work.make_bases(jobs or 1, console)
        chosen = work.tune()
        compared = [(name, chosen[name]) for name in plan.methods if name in chosen]
        results = work.run_part("main", compared)
        return work.comparison(chosen, results)


def _untuned(plan: RefereePlan, chosen: Mapping[str, Settings]) -> list[Failure]:
    """The methods that could not be compared, because no run of their tuning succeeded."""
    return [
        Failure(name, "tune", "", "no run of its tuning, or of that of a stage, succeeded")
        for name in plan.methods
        if name not in chosen
    ]
