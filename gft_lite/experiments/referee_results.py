"""What a referee's finished runs say: an outcome each, and the text of the design."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gft_lite.evaluation.metrics import by_problem
from gft_lite.experiments.outcomes import Cost, Outcome, Scores
from gft_lite.experiments.referee_methods import Settings
from gft_lite.experiments.referee_plan import DIAL_TRIALS, TUNE_SAMPLES, RefereePlan
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import Evaluation, RunFolder, stage_folder
from gft_lite.utils.imports import installed_version
from gft_lite.utils.memory import GIB
from gft_lite.version import __version__

_LIBRARIES = ("torch", "transformers", "peft", "vllm", "bitsandbytes")


def outcome(out: Path, result: Mapping[str, Any], settings: Settings) -> Outcome:
    """The outcome of a finished trial of the sweep `main`. Raises: UserError for damaged files."""
    folder = f"main/{result['folder']}"
    run = RunFolder(out / folder)
    recipe = Recipe.load(run.path / "recipe.yaml")
    first = last = run
    if recipe.stages:
        first = stage_folder(recipe, run, 0)
        last = stage_folder(recipe, run, len(recipe.stages) - 1)
    summary = result["summary"]
    return Outcome(
        method=result["method"],
        base=result["base"],
        seed=result["seed"],
        settings=settings,
        scores=_scores(last.evaluation("trained")),
        base_scores=_scores(first.evaluation("base")),
        figures=summary["trained"],
        kl=summary["trained"].get("kl"),
        cost=_cost(run, summary),
        folder=folder,
    )


def _scores(evaluation: Evaluation) -> Scores:
    return {name: by_problem(figures) for name, figures in evaluation.items()}


def _cost(run: RunFolder, summary: Mapping[str, Any]) -> Cost:
    peaks = [peak for metrics in run.metrics() if (peak := metrics.get("peak_memory"))]
    return Cost(
        trajectories=summary["trajectories"],
        trained_tokens=summary["trained_tokens"],
        rollout_tokens=summary["rollout_tokens"],
        seconds=summary["seconds"],
        peak_memory=max(peaks) / GIB if peaks else None,
    )


def describe(plan: RefereePlan) -> dict[str, str]:
    """What was run, as text by name."""
    options, tune = plan.options, plan.tune_set
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    versions = [f"gft-lite {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {v}" for name in _LIBRARIES if (v := installed_version(name))]
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
            " of its dial, or rates beyond or between the others; for each method with stages 3"
            f" trials of the last stage's rate; seed {plan.recipe.seed} on {plan.bases[0]}",
            "tuning set": f"{tune.source} {tune.split}, {tune.problems or 'all'} problems, "
            f"{min(TUNE_SAMPLES, plan.recipe.eval.samples)} samples each",
        }
    texts |= {"versions": ", ".join(versions), "hardware": _hardware()}
    return texts


def _hardware() -> str:
    import torch  # Here, so that a plan can be printed without it.

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
