"""Evaluations while training: their problems and files, the best of them, and the early stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import Any

import torch

from gft_lite.evaluation.metrics import by_problem, restrict
from gft_lite.policy.base import Policy
from gft_lite.recipe.course_sections import EvalSettings
from gft_lite.recipe.figures import BY_PROBLEM, lower_is_better, main_figure
from gft_lite.recipe.schema import Recipe
from gft_lite.rollout.sampling import sample_seed
from gft_lite.runs.folder import RunFolder
from gft_lite.runs.folder_forms import Evaluation
from gft_lite.types import Problem
from gft_lite.utils.distributed import Distributed
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.statistics import paired_interval

Sets = Mapping[str, Sequence[Problem]]
_ROUNDING = 1e-12  # An interval that ends at the limit can end a little above it.


@dataclass
class EvaluationSchedule:
    """The evaluations of `eval.every`, the best of them, and whether they end training.

    Everything follows from the files `eval/step-N.json` of the steps so far; `values` are the
    compared figure of each problem by step. `evaluate` samples and grades sets.
    """

    recipe: Recipe
    folder: RunFolder
    distributed: Distributed
    policy: Policy
    sets: Sets
    evaluate: Callable[[Sets], Evaluation]
    values: dict[int, dict[str, float]] = field(default_factory=dict)
    metric: str | None = None

    def __post_init__(self) -> None:
        self.chosen = choose_problems(self.sets, self.recipe.eval.problems)

    @property
    def is_complete(self) -> bool:
        """True if these evaluations are of all problems of the sets."""
        return all(len(self.chosen[name]) == len(self.sets[name]) for name in self.sets)

    def begin(self, base: Evaluation, step: int) -> None:
        """Take up the evaluations of a run that is at `step`; the base's figures are step 0.

        Raises: RecipeError if the evaluation does not have the figure `checkpoint.best.metric`.
        """
        best = self.recipe.checkpoint.best
        if not base and (best or self.recipe.early_stop.patience):
            rule = "must be problems that can be evaluated, for checkpoint.best and early_stop"
            raise RecipeError([f"data.holdout: {rule}, got none. Give eval.sets or more data."])
        if not (base and self.recipe.eval.every):
            return
        first = next(iter(base))
        self.metric = best.metric if best else f"{first}/{main_figure(base[first])}"
        if not self._values(base):
            found = [n for n in self.recipe.eval.figures_of(base) if self._values(base, n)]
            rule = f"must be a figure of the evaluation, {', '.join(found)}"
            raise RecipeError([f"checkpoint.best.metric: {rule}, got {self.metric!r}."])
        ids = {name: [p.id for p in problems] for name, problems in self.chosen.items()}
        of_base = {n: restrict(base[n], ids[n], self.recipe.eval.k) for n in self.sets}
        self._write(0, "", of_base)
        self.distributed.barrier()
        done = self.distributed.broadcast_from_main(lambda: self.folder.step_evaluations(step))
        self.values = {step: self._values(figures) for step, figures in done.items()}

    def is_due(self, step: int, *, last: bool) -> bool:
        """True if there is an evaluation after a step: every N steps, and after the last one."""
        every = self.recipe.eval.every
        return bool(every and self.sets) and (step % every == 0 or last)

    @property
    def share(self) -> float:
        """The share of the sets' problems that these evaluations are of."""
        every = sum(map(len, self.sets.values()))
        return sum(map(len, self.chosen.values())) / every if every else 1.0

    def to_come(self, step: int) -> float:
        """The number of evaluations after `step`, in ones of the size of these.

        That of the trained policy is of all problems, and the last of these if it is so too.
        """
        every, steps = self.recipe.eval.every, self.recipe.steps
        if not self.sets or steps is None:
            return 0.0
        due = -(-steps // every) - step // every if every and step < steps else 0
        return due + (0 if every and self.is_complete else 1 / self.share)

    def run(self, step: int) -> dict[str, Any]:
        """Evaluate what the engine serves, the policy after `step`; returns metrics of the step.

        An evaluation of the same adapter that a killed run has finished is not repeated.
        """
        adapter = _fingerprint(self.policy)
        figures = self.distributed.broadcast_from_main(lambda: self._known(step, adapter))
        if figures is None:
            figures = self.evaluate(self.chosen)
            self._write(step, adapter, figures)
        self.values[step] = self._values(figures)
        return {
            "eval": of_sets(figures),
            **({"best_step": self.best_step} if self.keeps_best else {}),
        }

    def finished(self, step: int) -> Evaluation | None:
        """The figures of the policy of `step` on all problems, if they are already known."""
        if step not in self.values or not self.is_complete:
            return None
        return self.distributed.broadcast_from_main(
            lambda: self.folder.step_evaluation(step)["sets"]
        )

    # --- the best --------------------------------------------------------------------------------

    @property
    def keeps_best(self) -> bool:
        """True with `checkpoint.best`."""
        return self.recipe.checkpoint.best is not None

    @property
    def best_step(self) -> int | None:
        """The step with the best mean, the earliest of equal ones; None before the first."""
        best = self.recipe.checkpoint.best
        means = {step: fmean(v.values()) for step, v in self.values.items() if step and v}
        if best is None or not means:
            return None
        return (min if self._falls else max)(means, key=lambda step: means[step])

    @property
    def _falls(self) -> bool:
        """True if a lower figure is better."""
        best = self.recipe.checkpoint.best
        return best.mode == "min" if best else lower_is_better(self.metric)

    def is_new_best(self, step: int) -> bool:
        """True if the evaluation of `step` needs a checkpoint, as it is the best."""
        return step in self.values and self.best_step == step

    # --- the early stop --------------------------------------------------------------------------

    def stop_reason(self) -> str | None:
        """Why training ends after the last evaluation by `early_stop`; None if it goes on."""
        settings = self.recipe.early_stop
        if settings.patience is None or not self.values:
            return None
        last = max(self.values)
        improved = max(self._improvements())
        without = sum(step > improved for step in self.values)
        if without < settings.patience:
            return None
        since = f"step {improved}" if improved else "the base"
        return (
            f"early_stop: {without} evaluations up to step {last} without an improvement of "
            f"{self.metric} on {since}"
        )

    def _improvements(self) -> Iterator[int]:
        """Step 0, and the steps whose paired interval with the improvement before is better."""
        least, reference = self.recipe.early_stop.min_delta, 0
        yield reference
        for step in sorted(self.values)[1:]:
            before, now = self.values[reference], self.values[step]
            shared = [name for name in now if name in before]
            if not shared:
                continue
            pair = [now[i] for i in shared], [before[i] for i in shared]
            low, high = paired_interval(*pair)
            better = -high if self._falls else low
            if better > least + _ROUNDING:
                reference = step
                yield step

    # --- files -----------------------------------------------------------------------------------

    def _values(self, figures: Evaluation, metric: str | None = None) -> dict[str, float]:
        """The compared figure of each problem; empty if the evaluation does not have it."""
        name, _, figure = (metric or self.metric or "").rpartition("/")
        return by_problem(figures[name], figure) if name in figures else {}

    def _known(self, step: int, adapter: str) -> Evaluation | None:
        if not self.folder.step_evaluation_file(step).exists():
            return None
        found = self.folder.step_evaluation(step)
        return found["sets"] if found["adapter"] == adapter else None

    def _write(self, step: int, adapter: str, figures: Evaluation) -> None:
        file = self.folder.step_evaluation_file(step)
        self.folder.write_json(
            file.relative_to(self.folder.path), {"adapter": adapter, "sets": figures}
        )


def size_notes(settings: EvalSettings, sets: Sets) -> list[str]:
    """The sets that are smaller than `eval.problems`, and that it needs `eval.every`, as text."""
    count = settings.problems
    if count is None:
        return []
    if not settings.every:
        return ["eval.problems: has no effect without eval.every; the evaluations before and after "
                "training are of all problems"]  # fmt: skip
    return [
        f"eval.problems: is {count:,}, but {name} has {len(problems):,} problems, which are all "
        "evaluated"
        for name, problems in sets.items()
        if len(problems) < count
    ]


def choose_problems(sets: Sets, count: int | None) -> dict[str, Sequence[Problem]]:
    """At most `count` problems of each set in their order, drawn by the set's name alone."""

    def chosen(name: str, problems: Sequence[Problem]) -> Sequence[Problem]:
        if count is None or count >= len(problems):
            return problems
        numbers = Random(sample_seed("eval.problems", name)).sample(range(len(problems)), count)
        return [problems[i] for i in sorted(numbers)]

    return {name: chosen(name, problems) for name, problems in sets.items()}


def of_sets(figures: Evaluation) -> dict[str, Any]:
    """The results of each set as metrics, without those of each problem, which are too long."""
    return {name: {k: v for k, v in of_set.items() if k not in BY_PROBLEM}
            for name, of_set in figures.items()}  # fmt: skip


def _fingerprint(policy: Policy) -> str:
    """A hash of the adapter's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in policy.parameters().items():
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{values.dtype}\0{tuple(values.shape)}\0".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
