"""Staged training: runs that each continue from the adapter of the previous one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from rich.console import Console

from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import BASE_EVALUATION, base_inputs, copy_base_files
from gft_lite.runs.folder import RunFolder, stage_folder
from gft_lite.training.shared_parts import SharedParts
from gft_lite.training.single_run import train_single
from gft_lite.utils.distributed import Distributed


def train_stages(
    recipe: Recipe, run: RunFolder, distributed: Distributed, console: Console,
    shared: SharedParts | None,
) -> RunFolder:  # fmt: skip
    """Run the stages that are not finished yet, each with a fresh optimiser.

    Every stage is a run of its own under `stages/`. The whole run has the last stage's adapter,
    the metrics of all stages, and a summary from the first base to the last policy.
    """
    run.create(recipe.to_yaml())
    stages: list[RunFolder] = []
    for number, stage in enumerate(recipe.stages):
        settings = recipe.stage(number)
        before = stages[-1] if stages else None
        if before:
            settings = _from_adapter(settings, before.adapter.resolve(), stage.reference)
        here = stage_folder(recipe, run, number)
        if not distributed.broadcast_from_main((here.path / "summary.json").exists):
            console.print(f"stage {number + 1} of {len(recipe.stages)}: {stage.method}")
            if (
                distributed.is_main
                and before
                and not here.path.exists()
                and _same_base(recipe, number)
            ):
                copy_base_files(here, settings, before, [BASE_EVALUATION])
            begun = distributed.broadcast_from_main((here.path / "recipe.yaml").exists)
            train_single(
                settings, here.path, resume=begun, distributed=distributed, console=console,
                shared=shared,
            )  # fmt: skip
        stages.append(here)
    if distributed.is_main:
        _conclude(recipe, run, stages)
    distributed.barrier()
    return run


def _from_adapter(recipe: Recipe, adapter: Path, reference: str) -> Recipe:
    tree = recipe.model_dump()
    tree["policy"] |= {
        "adapter": str(adapter),
        "reference": "adapter" if reference == "start" else "base",
    }
    return Recipe.from_tree(tree)


def _same_base(recipe: Recipe, number: int) -> bool:
    """True if a stage evaluates the base as the previous stage does."""
    return base_inputs(recipe.stage(number)) == base_inputs(recipe.stage(number - 1))


def _conclude(recipe: Recipe, run: RunFolder, stages: list[RunFolder]) -> None:
    summaries = [stage.summary() for stage in stages]
    shutil.copytree(stages[-1].adapter, run.adapter, dirs_exist_ok=True)
    lines = [
        json.dumps({"stage": number, **metrics}) + "\n"
        for number, stage in enumerate(stages, start=1)
        for metrics in stage.metrics()
    ]
    (run.path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    added = ("trajectories", "rollout_tokens", "trained_tokens", "steps", "updates",
             "skipped_steps")  # fmt: skip
    phases = summaries[0]["seconds"]
    run.write_json(
        "summary.json",
        {
            "name": recipe.name,
            "method": " > ".join(summary["method"] for summary in summaries),
            "seed": recipe.seed,
            "base": summaries[0]["base"],
            "trained": summaries[-1]["trained"],
            "stages": [{"method": s["method"], **s["trained"]} for s in summaries],
            "seconds": {p: sum(s["seconds"][p] for s in summaries) for p in phases},
            "problems": summaries[-1]["problems"],
            "guard": {
                "alarms": dict(sum((Counter(s["guard"]["alarms"]) for s in summaries), Counter())),
                "rollbacks": sum(s["guard"]["rollbacks"] for s in summaries),
            },
            **{name: sum(s[name] for s in summaries) for name in added},
        },
    )
