"""The figures of each run in a report: settings, scores, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gft_lite.evaluation.metrics import by_problem
from gft_lite.objective.methods import METHODS
from gft_lite.recipe.figures import COMPARED, label_of, lower_is_better
from gft_lite.recipe.schema import Recipe
from gft_lite.report.curves import SHARE, unit_of_figure
from gft_lite.report.loading import Run
from gft_lite.utils.statistics import bootstrap_interval, paired_interval
from gft_lite.utils.tables import flatten

PHASES = ("rollout", "reward", "train", "sync", "eval")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95% interval, None if it has none."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A figure of the base and of the trained policy, and the difference on the same problems."""

    unit: str
    base: Estimate | None
    trained: Estimate | None
    difference: Estimate | None = None
    lower_is_better: bool = False

    @property
    def change(self) -> str:
        """What the difference is called; one of shares is in points."""
        if self.lower_is_better:
            return "difference"
        return "gain, points" if self.unit == SHARE else "gain"


def scores_of(run: Run) -> dict[str, Score]:
    """pass@k of every evaluated set by `SET, pass@k`; 95% bootstrap intervals over problems.

    Sets without a rule that decides correctness have their mean reward, by `SET, mean reward`, and
    those without answers the likelihood of their demonstrations, by `SET, nll`.
    """
    base, trained = run.evals.get("base", {}), run.evals.get("trained", {})
    found = {}
    for name in dict.fromkeys([*base, *trained]):
        sets = base.get(name), trained.get(name)
        for figure in (n for f in COMPARED for n in f.names(sorted({1, *run.recipe.eval.k}))):
            before, after = (by_problem(figures, figure) if figures else {} for figures in sets)
            if before or after:
                found[f"{name}, {label_of(figure)}"] = _score(figure, before, after)
    return found


def _score(figure: str, before: Mapping[str, float], after: Mapping[str, float]) -> Score:
    return Score(unit_of_figure(figure), _estimate(before), _estimate(after),
                 _difference(before, after), lower_is_better(figure))  # fmt: skip


def _estimate(values: Mapping[str, float]) -> Estimate | None:
    if not values:
        return None
    return Estimate(_mean(list(values.values())), bootstrap_interval(list(values.values())))


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> Estimate | None:
    shared = [name for name in after if name in before]
    if not shared:
        return None
    a, b = [after[name] for name in shared], [before[name] for name in shared]
    return Estimate(_mean(a) - _mean(b), paired_interval(a, b))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def kl_of(run: Run) -> float | None:
    """KL(reference || policy) of the trained policy in nats per token, on held-out prompts."""
    return run.summary["trained"].get("kl") if run.summary else None


def facts_of(run: Run) -> dict[str, str]:
    """The settings and the state of a run as text. A user's own method is not imported."""
    recipe = run.recipe
    method = METHODS.get(recipe.method)
    counts = [(getattr(recipe.group, s), s) for s in ("expert", "teacher", "self")]
    facts = {
        "state": "finished" if run.summary else "unfinished",
        "method": recipe.method,
        "loss of a token": method.formula if method else "-",
        "group": " + ".join(f"{n} {source}" for n, source in counts if n) or "-",
        **_parameters(recipe),
        "model": recipe.policy.model,
        "quantisation": recipe.policy.quantization,
        "adapter": f"LoRA, rank {recipe.policy.lora.rank}",
        "learning rate": f"{recipe.optim.rate:g}, {recipe.optim.schedule}",
        "seed": str(recipe.seed),
    }
    done, planned = len(run.metrics), recipe.steps
    facts["steps"] = f"{done:,}" if done == planned or not planned else f"{done:,} of {planned:,}"
    skipped = sum(m.get("skipped") is not None for m in run.metrics)
    return {
        **facts,
        **({"steps with nothing to learn": f"{skipped:,}"} if skipped else {}),
        **_course(run),
    }


def _course(run: Run) -> dict[str, str]:
    """The alarms of the collapse guard, an early end, and a policy that is not the last one's."""
    found = {}
    alarms = [
        f"{', '.join(m['guard']['alarms'])} at step {m['step']}"
        + (f", back to step {m['guard']['restored']}" if "restored" in m["guard"] else "")
        for m in run.metrics
        if "guard" in m
    ]
    if alarms:
        found["collapse guard"] = "; ".join(alarms)
    for m in run.metrics:
        if "stopped" in m:
            found["training ended by"] = f"{m['stopped']} at step {m['step']}"
    final, best = (run.summary or {}).get("policy_of_step"), run.recipe.checkpoint.best
    if best and final is not None and final != len(run.metrics):
        found["final policy"] = f"of step {final}, the best by {best.metric}"
    return found


def _parameters(recipe: Recipe) -> dict[str, str]:
    """The parameters of the method's loss."""
    method = METHODS.get(recipe.method)
    names = method.parameters if method else recipe.objective.model_extra or {}
    return {name: str(getattr(recipe.objective, name)) for name in names}


def cost_of(run: Run) -> dict[str, str]:
    """The costs of a run: trajectories, tokens, tokens per second, memory."""
    cost = {
        "trajectories": f"{_total(run, 'trajectories'):,}",
        "tokens trained on": f"{_total(run, 'trained_tokens'):,}",
    }
    for phase, tokens in (("rollout", "rollout_tokens"), ("train", "trained_tokens")):
        seconds = sum(m["seconds"].get(phase, 0.0) for m in run.metrics)
        if seconds and _total(run, tokens):
            cost[f"{phase} tokens/s"] = f"{_total(run, tokens) / seconds:,.0f}"
    peaks = [m["peak_memory"] for m in run.metrics if m.get("peak_memory") is not None]
    if peaks:
        cost["peak memory"] = f"{max(peaks) / 2**30:.2f} GiB"
    return cost


def _total(run: Run, name: str) -> int:
    return sum(m[name] for m in run.metrics)


def seconds_of(run: Run) -> dict[str, float]:
    """Seconds by phase; `other` is the rest of the total."""
    found = {p: sum(m["seconds"].get(p, 0.0) for m in run.metrics) for p in PHASES}
    if run.summary:
        total = run.summary["seconds"]
        found["eval"] = total["eval"]
        # After a resumption, the total is of the last process, the phases of all processes.
        found["other"] = max(total["total"] - sum(found.values()), 0.0)
    return {phase: seconds for phase, seconds in found.items() if seconds > 0}


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The recipe fields in which runs differ, with the value of each run."""
    recipes = [flatten(run.recipe.model_dump(mode="json")) for run in runs]
    fields = dict.fromkeys(field for recipe in recipes for field in recipe)
    table = {
        field.replace("/", "."): [str(recipe.get(field, "-")) for recipe in recipes]
        for field in fields
    }
    return {field: values for field, values in table.items() if len(set(values)) > 1}
