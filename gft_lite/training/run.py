"""TODO: gft_lite/training/run.py"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from gft_lite.evaluation.metrics import headline
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.console import TrainingConsole
from gft_lite.runs.folder import RunFolder, find_folder
from gft_lite.runs.metrics import PhaseTimer
from gft_lite.runs.model_card import write_card
from gft_lite.training.kl_monitor import _held_out_kl
from gft_lite.training.learner import _dry_step
from gft_lite.training.loop import _train_steps
from gft_lite.training.session import Session, open_session
from gft_lite.training.stages import train_stages
from gft_lite.utils.distributed import init_distributed
from gft_lite.utils.memory import GIB


def train(
    recipe: Recipe, out: str | Path | None = None, *, resume: bool = False,
    console: Console | None = None,
) -> RunFolder:  # fmt: skip
    """Train as the recipe says and return the run's folder.

    Raises: RecipeError when the recipe or `out` is wrong, TrainError when training failed.
    """
    distributed = init_distributed(recipe.policy.device)
    console = (console or Console(stderr=True)) if distributed.is_main else Console(quiet=True)
    if recipe.stages:
        folder = find_folder(recipe, out, resume=resume, distributed=distributed)
        with folder.lock():
            train_stages(recipe, folder, distributed, train, console)
            if distributed.is_main:
                write_card(folder)
            return folder
    started = time.perf_counter()
    with ExitStack() as stack:
        session = open_session(
            recipe, out, resume=resume, distributed=distributed, console=console, stack=stack
        )
        clock = PhaseTimer()
        with clock("eval"):
            console.print(f"evaluating the base on {', '.join(session.eval_sets) or 'nothing'}")
            file = session.run.path / "eval" / "base.json"
            base = distributed.cached_json(file, session.evaluate)
        first = session.restore() if resume else 0
        session.engine.sleep()
        _dry_step(session)
        session.sync(first)
        with TrainingConsole(console, recipe.steps, first) as screen:
            _train_steps(session, first, screen)
        console.print("evaluating the trained policy")
        with clock("eval"):
            trained = session.evaluate()
        session.engine.close()
        session.run.write_json("eval/trained.json", trained)
        if distributed.is_main:
            session.policy.save_adapter(session.run.adapter)
        seconds = {"total": time.perf_counter() - started, "eval": clock.seconds["eval"]}
        _tell_memory(session)
        session.run.write_json("summary.json", _summary(session, base, trained, seconds))
        if distributed.is_main:
            write_card(session.run)
    # The last adapter that the engine was fed, of use to nobody else.
    shutil.rmtree(session.run.scratch, ignore_errors=True)
    distributed.barrier()
    return session.run


def _tell_memory(session: Session) -> None:
    """What the memory plan said, and what the steps took."""
    steps = [m["peak_memory"] for m in session.run.metrics() if "peak_memory" in m]
    if session.plan is None or not steps:
        return
    on_gpu = session.policy.device.type == "cuda"
    # Without a GPU it is the process that is measured, over what it held before.
    measured = max(steps) - (0 if on_gpu else session.resting_memory)
    predicted = session.plan.predicted_peak if on_gpu else session.plan.peak
    session.console.print(
        f"memory: {predicted / GIB:.2f} GiB planned at most, {measured / GIB:.2f} GiB measured"
    )


def _summary(
    session: Session, base: dict[str, Any], trained: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    recipe, metrics = session.recipe, session.run.metrics()
    phases = {p: sum(m["seconds"].get(p, 0.0) for m in metrics)
              for p in ("rollout", "reward", "train", "sync")}  # fmt: skip
    return {
        "name": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        "base": {**headline(base, recipe.eval.k), "kl": 0.0},
        "trained": {**headline(trained, recipe.eval.k), "kl": _held_out_kl(session)["forward"]},
        "seconds": {**seconds, **phases},
        "off_policy": session.offline is not None,
        "problems": len(session.problems),
        "trajectories": sum(m["trajectories"] for m in metrics),
        "sources": dict(sum((Counter(m["sources"]) for m in metrics), Counter())),
        "rollout_tokens": sum(m["rollout_tokens"] for m in metrics),
        "trained_tokens": sum(m["trained_tokens"] for m in metrics),
        "steps": len(metrics),
        "updates": sum(m["updates"] for m in metrics),
        "skipped_steps": sum(m["skipped"] is not None for m in metrics),
    }
