"""What a referee's finished runs say: an outcome each, and where they ran."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gft_lite.evaluation.metrics import by_problem
from gft_lite.experiments.outcomes import Cost, Outcome, Scores
from gft_lite.experiments.referee_methods import Settings
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


def environment() -> dict[str, str]:
    """The versions and the hardware of the runs, as text by name."""
    import torch  # Here, so that a plan can be printed without it.

    versions = [f"gft-lite {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {v}" for name in _LIBRARIES if (v := installed_version(name))]
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"versions": ", ".join(versions), "hardware": hardware}
