"""Points of a sweep that Optuna proposes by the results of the runs before, and early stops.

Optuna's study is in OUT/search.jsonl; the runs know nothing of it. What is proposed follows from
the seed and the study alone, and the study from the figures of the runs in the order of their
ends: with one job, a search that was interrupted gives the same points as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from gft_lite.data.problems import lacks_answers
from gft_lite.experiments.sweep_config import Range, SearchSettings, Sweep, Trial, rounded
from gft_lite.experiments.sweep_results import SweepFolder
from gft_lite.recipe.figures import NLL, figure_of, lower_is_better, main_figure
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder, stage_folder
from gft_lite.runs.folder_forms import Evaluation
from gft_lite.utils.errors import RecipeError, UserError

STUDY = "search.jsonl"
# Proposals of known points, or of points that are no valid recipe, before the search ends.
_ATTEMPTS, _TPE_ATTEMPTS = 200, 10
# The share of runs that goes on at a comparison is 1 / _REDUCTION.
_REDUCTION = 3
# What the points depend on; a search can be continued with more trials.
_FIXED = ("recipe", "overrides", "grid", "random_seed")
_STEP = "stopped at step"


class Search:
    """Proposes trials and learns from their runs, by the names of the trials.

    Raises: UserError if Optuna is not installed or the folder has another search.
    """

    def __init__(self, plan: Sweep, folder: SweepFolder) -> None:
        try:
            import optuna
        except ModuleNotFoundError as error:
            rule = "--search: optuna must be installed, got no such module"
            raise UserError([f'{rule}. pip install "gft-lite[optuna]".']) from error
        assert plan.search is not None
        self._optuna: Any = optuna
        self._states = optuna.trial.TrialState
        self._plan, self.settings = plan, _with_figure(plan.search, plan.trials()[0].recipe)
        self._distributions = {field: self._distribution(v) for field, v in plan.grid.items()}
        self.folder = folder
        self._study = self._open(folder.path / STUDY)
        self._open_trials: dict[str, Any] = {}
        self._names: set[str] = set()

    def known(self) -> Iterator[tuple[Trial, int | None]]:
        """The trials so far and the steps at which they were stopped.

        Failed ones are left out: the search proposes others in their place.
        """
        for frozen in self._study.trials:
            if frozen.state != self._states.FAIL:
                trial = self._trial(frozen.params)
                self._names.add(trial.name)
                if frozen.state == self._states.RUNNING:
                    number = frozen._trial_id
                    self._open_trials[trial.name] = self._optuna.trial.Trial(self._study, number)
                yield trial, frozen.user_attrs.get(_STEP)

    def propose(self) -> Trial | None:
        """A new trial; None if there are enough, or the search finds no new point."""
        if len(self._names) >= self.settings.trials:
            return None
        wrong: RecipeError | None = None
        for attempt in range(_ATTEMPTS):
            asked = self._ask(attempt)
            try:
                trial = self._trial(asked.params)
            except RecipeError as error:  # Values that are not valid together.
                trial, wrong = None, error
            if trial and trial.name not in self._names:
                self._names.add(trial.name)
                self._open_trials[trial.name] = asked
                return trial
            self._study.tell(asked, state=self._states.FAIL)
        if wrong:
            raise wrong
        return None

    def observe(self, trial: Trial, run: RunFolder) -> int | None:
        """Take up a run's new evaluations; returns the step at which it is to be stopped, or None.

        Each evaluation is compared once, in order, so that the outcome does not depend on when.
        """
        asked = self._open_trials.get(trial.name)
        if asked is None or not self.settings.prune:
            return None
        curve = self._curve(run)
        seen = len(self._study.trials[asked.number].intermediate_values)
        for number, (step, value) in enumerate(curve[seen:], start=seen + 1):
            asked.report(value, number)
            if asked.should_prune():
                asked.set_user_attr(_STEP, step)
                self._end(trial, state=self._states.PRUNED)
                return step
        return None

    def finish(self, trial: Trial, run: RunFolder) -> None:
        """Take up the result of a run that ended; one without a summary has failed."""
        self.observe(trial, run)
        if trial.name not in self._open_trials:
            return
        if (run.path / "summary.json").exists():
            self._end(trial, value=self._final(trial, run))
        else:
            self._end(trial, state=self._states.FAIL)

    def summary(self) -> dict[str, Any]:
        """The metric, and the name and the figure of the best trial that was not stopped."""
        done = [t for t in self._study.trials if t.state == self._states.COMPLETE]
        best = self._study.best_trial if done else None
        return {
            **self.settings.model_dump(),
            "best": best and self._trial(best.params).name,
            "figure": best and best.value,
        }

    # --- Optuna ------------------------------------------------------------------------------

    def _open(self, file: Path) -> Any:
        """The study of a file. Raises: UserError if it is damaged or that of another search."""
        optuna = self._optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        backend = optuna.storages.journal.JournalFileBackend(str(file))
        try:
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name=self._plan.name,
                direction="maximize" if self.settings.mode == "max" else "minimize",
                # Comparisons are numbered by evaluations, not by steps.
                pruner=optuna.pruners.SuccessiveHalvingPruner(1, _REDUCTION),
                load_if_exists=True,
            )
        except (ValueError, KeyError) as error:
            rule = "must be a study of Optuna"
            raise UserError([f"{file}: {rule}, got {error}. Restore it from a copy."]) from error
        tree = self._plan.model_dump(mode="json", include={*_FIXED})
        tree["search"] = self.settings.model_dump(exclude={"trials"})
        if study.user_attrs.setdefault("plan", tree) != tree:
            rule = "--out: must be a new folder or one of the same search"
            raise UserError([f"{rule}, got another in {file}. Choose another folder."])
        study.set_user_attr("plan", tree)
        return study

    def _ask(self, attempt: int) -> Any:
        """A proposal; a random one after a few that were not new, as those of a small grid."""
        number = len(self._study.trials)
        # The state of a sampler is not saved, so each proposal has a seed of its own.
        seed = Random(f"{self._plan.random_seed}/{number}").getrandbits(32)
        samplers = self._optuna.samplers
        sampler = samplers.TPESampler if attempt < _TPE_ATTEMPTS else samplers.RandomSampler
        self._study.sampler = sampler(seed=seed)
        return self._study.ask(self._distributions)

    def _end(self, trial: Trial, value: float | None = None, state: Any = None) -> None:
        self._study.tell(self._open_trials.pop(trial.name), value, state)

    def _distribution(self, values: list[Any] | Range) -> Any:
        distributions = self._optuna.distributions
        if isinstance(values, Range):
            return distributions.FloatDistribution(*sorted(values.bounds), log=bool(values.log))
        return distributions.CategoricalDistribution([json.dumps(v, default=str) for v in values])

    def _trial(self, parameters: Mapping[str, Any]) -> Trial:
        """The trial of a point of the study, in which values of lists are JSON."""
        point = {
            field: rounded(parameters[field])
            if isinstance(values, Range)
            else next(v for v in values if json.dumps(v, default=str) == parameters[field])
            for field, values in self._plan.grid.items()
        }
        [trial] = self._plan.trials_at(point)
        return trial

    # --- figures -----------------------------------------------------------------------------

    def _curve(self, run: RunFolder) -> list[tuple[int, float]]:
        """The step and the figure of each evaluation while training."""
        found = ((m["step"], m["eval"]) for m in run.metrics() if "eval" in m)
        return [(step, self._chosen(sets)) for step, sets in found]

    def _final(self, trial: Trial, run: RunFolder) -> float:
        """The figure of a finished run, of its last stage if it has stages."""
        recipe = trial.recipe
        last = stage_folder(recipe, run, len(recipe.stages) - 1) if recipe.stages else run
        return self._chosen(last.evaluation("trained"))

    def _chosen(self, sets: Evaluation) -> float:
        """The figure of an evaluation by which runs are compared. Raises: UserError without it."""
        first = next(iter(sets))
        metric = self.settings.metric or f"{first}/{main_figure(sets[first])}"
        name, _, figure = metric.rpartition("/")
        if figure not in sets[name]:
            rule = f"search.metric: must be a figure of {name}, which has {main_figure(sets[name])}"
            raise UserError([f"{rule}, got {metric!r}."])
        if lower_is_better(metric) and self.settings.metric is None and self.settings.mode == "max":
            rule = f"search.metric: must be given for {figure}, got none"
            raise UserError([f"{rule}. Write {metric}."])
        return sets[name][figure]


def _with_figure(settings: SearchSettings, recipe: Recipe) -> SearchSettings:
    """The settings with `nll` as the metric if none is given and the first set has no answers.

    Raises: UserError for a metric that needs answers, of a set without them.
    """
    name, _, figure = (settings.metric or f"{next(iter(recipe.eval.sets))}/").rpartition("/")
    if not lacks_answers(recipe.eval.sets[name], recipe.reward):
        return settings
    if figure and figure_of(figure).graded:
        rule = f"search.metric: must be a figure of {name}, which has no answers"
        raise UserError([f"{rule}, got {settings.metric!r}. Write {name}/{NLL}."])
    given = settings.model_dump(exclude_unset=True)
    return SearchSettings(**{**given, "metric": f"{name}/{NLL}"})
