"""One run from its first evaluation to its summary, without stages."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from gft_lite.evaluation.metrics import headline
from gft_lite.objective.methods import find_method
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.console import TimeLeft, TrainingConsole
from gft_lite.runs.export import save_final_adapter
from gft_lite.runs.folder import RunFolder, find_folder
from gft_lite.runs.metrics import PHASES, PhaseTimer
from gft_lite.runs.model_card import write_card
from gft_lite.training.course import course_summary
from gft_lite.training.dry_step import dry_step
from gft_lite.training.evaluation_schedule import of_sets
from gft_lite.training.loop import train_steps
from gft_lite.training.setup import Place, TrainingRun, setup_run
from gft_lite.training.shared_parts import SharedParts
from gft_lite.utils.distributed import Distributed
from gft_lite.utils.memory import GIB
from gft_lite.utils.progress import show_phase


def train_single(
    recipe: Recipe, out: str | Path | None, *, resume: bool, distributed: Distributed,
    console: Console, shared: SharedParts | None = None,
) -> RunFolder:  # fmt: skip
    """Train without stages and return the run's folder; `shared` has parts of earlier runs.

    Raises: RecipeError if the recipe or `out` is wrong, TrainError if training failed.
    """
    started = time.perf_counter()
    folder = find_folder(recipe, out, resume=resume, distributed=distributed)
    with ExitStack() as stack:
        run = setup_run(recipe, Place(folder, distributed, console, stack, shared))
        timer = PhaseTimer()
        evaluating = f"evaluating the base on {', '.join(run.eval_sets) or 'nothing'}"
        with timer("eval"), show_phase(console, evaluating):
            base = run.evaluate_base()
        first = run.restore() if resume else 0
        run.schedule.begin(base, first)
        if not first:
            start = folder.step_evaluation(0)["sets"] if recipe.eval.every else base
            run.trackers.log({"eval": of_sets(start)}, 0)
        if recipe.guard.action == "rollback" and not first:
            run.save_checkpoint(0)
        dry_step(run)
        with show_phase(console, "loading the adapter into the engine", announce=False):
            run.engine.sync(first)
        compares = find_method(recipe.method).group_advantages
        past = folder.metrics() if first else []
        seconds_of_base = timer.seconds["eval"] * run.schedule.share
        left = TimeLeft(recipe.steps, first, run.schedule.to_come, seconds_of_base)
        with TrainingConsole(
            console, recipe.steps, first, compares=compares, history=past, left=left
        ) as screen:
            last = train_steps(run, first, screen)
        final = run.load_final(last)
        with timer("eval"), show_phase(console, "evaluating the trained policy"):
            trained = run.schedule.finished(final) or run.evaluate()
        _print_memory(run)
        with show_phase(console, "KL, final adapter and model card", announce=False):
            run.engine.rest() if shared else run.engine.close()
            folder.write_json("eval/trained.json", trained)
            if distributed.is_main:
                save_final_adapter(run.policy, folder.adapter)
            seconds = {"total": time.perf_counter() - started, "eval": timer.seconds["eval"]}
            summary = _summary(run, base, trained, seconds) | course_summary(run, final)
            folder.write_json("summary.json", summary)
            # With eval.every, the last step was logged with its evaluation.
            end = {} if recipe.eval.every else {"eval": of_sets(trained)}
            run.trackers.log({**end, "summary": summary}, summary["steps"])
            if distributed.is_main:
                write_card(folder)
    # The last adapter that the engine loaded is also in the checkpoint.
    shutil.rmtree(folder.scratch, ignore_errors=True)
    distributed.barrier()
    return folder


def _print_memory(run: TrainingRun) -> None:
    """The planned and the measured peak."""
    steps = [m["peak_memory"] for m in run.folder.metrics() if "peak_memory" in m]
    if run.plan is None or not steps:
        return
    on_gpu = run.policy.device.type == "cuda"  # On a CPU the whole process is measured.
    planned = run.plan.predicted_peak if on_gpu else run.plan.peak
    run.console.print(
        f"memory: {planned / GIB:.2f} GiB planned at most, {max(steps) / GIB:.2f} GiB measured"
    )


def _summary(
    run: TrainingRun, base: dict[str, Any], trained: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    recipe, metrics = run.recipe, run.folder.metrics()
    phases = {phase: sum(m["seconds"].get(phase, 0.0) for m in metrics) for phase in PHASES}
    phases["eval"] = seconds["eval"] + sum(m["seconds"].get("eval", 0.0) for m in metrics)
    kl = run.monitor.held_out(run.learner.micro_batch_tokens)["forward"]
    return {
        "name": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        "base": {**headline(base, recipe.eval.k), "kl": 0.0},
        "trained": {**headline(trained, recipe.eval.k), "kl": kl},
        "seconds": {**seconds, **phases},
        "off_policy": run.builder.presampled is not None,
        "problems": len(run.builder.problems),
        "trajectories": sum(m["trajectories"] for m in metrics),
        "sources": dict(sum((Counter(m["sources"]) for m in metrics), Counter())),
        "rollout_tokens": sum(m["rollout_tokens"] for m in metrics),
        "trained_tokens": sum(m["trained_tokens"] for m in metrics),
        "steps": len(metrics),
        "updates": sum(m["updates"] for m in metrics),
        "skipped_steps": sum(m["skipped"] is not None for m in metrics),
        **run.grading.judge_totals(),
    }
