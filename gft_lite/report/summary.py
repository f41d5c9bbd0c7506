"""What a report says of each run in figures: what it was, what it reached, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gft_lite.objective.methods import find_method
from gft_lite.report.curves import sample_count
from gft_lite.report.loading import Run
from gft_lite.utils.statistics import bootstrap_interval, paired_interval, pass_at_k
from gft_lite.utils.tables import flatten

PHASES = ("rollout", "reward", "train", "sync", "eval")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95% interval, None where there is none."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A figure of the base and of the trained policy, and the difference on the same problems."""

    base: Estimate | None
    trained: Estimate | None
    difference: Estimate | None = None


def scores_of(run: Run) -> dict[str, Score]:
    """pass@k of every evaluated set by `SET, pass@k`; 95% bootstrap intervals over problems."""
    base, trained = run.evals.get("base", {}), run.evals.get("trained", {})
    found = {}
    for name in dict.fromkeys([*base, *trained]):
        for k in sorted({1, *run.recipe.eval.k}):
            before, after = (_by_problem(evals.get(name), k) for evals in (base, trained))
            if before or after:
                score = Score(_estimate(before), _estimate(after), _difference(before, after))
                found[f"{name}, pass@{k}"] = score
    return found


def _by_problem(figures: Mapping[str, Any] | None, k: int) -> dict[str, float]:
    if figures is None or (samples := sample_count(figures)) < k:
        return {}
    return {name: pass_at_k(samples, right, k) for name, right in figures["correct"].items()}


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
    """What the run was, in words."""
    recipe = run.recipe
    method = find_method(recipe.method)
    counts = [(getattr(recipe.group, s), s) for s in ("expert", "teacher", "self")]
    facts = {
        "state": "finished" if run.summary else "unfinished",
        "method": recipe.method,
        "loss of a token": method.formula,
        "group": " + ".join(f"{n} {source}" for n, source in counts if n) or "-",
        "tau": f"{recipe.objective.tau:g}" if "tau" in method.parameters else "-",
        "model": recipe.policy.model,
        "quantisation": recipe.policy.quantization,
        "adapter": f"LoRA, rank {recipe.policy.lora.rank}",
        "learning rate": f"{recipe.optim.lr:g}, {recipe.optim.schedule}",
        "seed": str(recipe.seed),
    }
    done, planned = len(run.metrics), recipe.steps
    facts["steps"] = f"{done:,}" if done == planned or not planned else f"{done:,} of {planned:,}"
    skipped = sum(m.get("skipped") is not None for m in run.metrics)
    return {**facts, **({"steps with nothing to learn": f"{skipped:,}"} if skipped else {})}


def cost_of(run: Run) -> dict[str, str]:
    """What the run took: trajectories, tokens, tokens per second, seconds, memory."""
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
    """Seconds by phase; what no phase counted is `other`."""
    found = {p: sum(m["seconds"].get(p, 0.0) for m in run.metrics) for p in PHASES}
    if run.summary:
        total = run.summary["seconds"]
        found["eval"] = total["eval"]
        # After a resumption the total is that of the last process, the phases those of all.
        found["other"] = max(total["total"] - sum(found.values()), 0.0)
    return {phase: seconds for phase, seconds in found.items() if seconds > 0}


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The recipe's fields in which runs differ, with the value of each."""
    recipes = [flatten(run.recipe.model_dump(mode="json")) for run in runs]
    fields = dict.fromkeys(field for recipe in recipes for field in recipe)
    table = {
        field.replace("/", "."): [str(recipe.get(field, "-")) for recipe in recipes]
        for field in fields
    }
    return {field: values for field, values in table.items() if len(set(values)) > 1}
