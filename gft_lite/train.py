"""The loop: roll out, score, advantages, update, sync; readable from top to bottom."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gft_lite import drift
from gft_lite import groups as grouping
from gft_lite.batching import Row
from gft_lite.card import write_card
from gft_lite.figures import headline
from gft_lite.interrupt import deferred
from gft_lite.memory import GIB
from gft_lite.offline import turns
from gft_lite.optim import combined, gradient, portion, update
from gft_lite.ranks import find_ranks
from gft_lite.recipe import Recipe
from gft_lite.runlog import (
    Clock,
    RunFolder,
    Screen,
    group_metrics,
    own_tokens,
)
from gft_lite.session import Session, find_folder, open_session, process_memory
from gft_lite.stages import train_stages
from gft_lite.types import Group


class TrainError(RuntimeError):
    """Training can't go on; the last checkpoint holds."""


def train(
    recipe: Recipe, out: str | Path | None = None, *, resume: bool = False,
    console: Console | None = None,
) -> RunFolder:  # fmt: skip
    """Train as the recipe says and return the run's folder.

    Raises: RecipeError when the recipe or `out` is wrong, TrainError when training failed.
    """
    ranks = find_ranks(recipe.policy.device)
    console = (console or Console(stderr=True)) if ranks.main else Console(quiet=True)
    if recipe.stages:
        folder = find_folder(recipe, out, resume=resume, ranks=ranks)
        with folder.alone():
            train_stages(recipe, folder, ranks, train, console)
            if ranks.main:
                write_card(folder)
            return folder
    started = time.perf_counter()
    with ExitStack() as stack:
        session = open_session(
            recipe, out, resume=resume, ranks=ranks, console=console, stack=stack
        )
        clock = Clock()
        with clock("eval"):
            console.print(f"evaluating the base on {', '.join(session.eval_sets) or 'nothing'}")
            file = session.run.path / "eval" / "base.json"
            base = ranks.cached(file, session.evaluate)
        first = session.restore() if resume else 0
        session.engine.sleep()
        _dry_step(session)
        session.sync(first)
        with Screen(console, recipe.steps, first) as screen:
            _train_steps(session, first, screen)
        console.print("evaluating the trained policy")
        with clock("eval"):
            trained = session.evaluate()
        session.engine.close()
        session.run.write_json("eval/trained.json", trained)
        if ranks.main:
            session.policy.save_adapter(session.run.adapter)
        seconds = {"total": time.perf_counter() - started, "eval": clock.seconds["eval"]}
        _tell_memory(session)
        session.run.write_json("summary.json", _summary(session, base, trained, seconds))
        if ranks.main:
            write_card(session.run)
    # The last adapter that the engine was fed, of use to nobody else.
    shutil.rmtree(session.run.scratch, ignore_errors=True)
    ranks.wait()
    return session.run


def _train_steps(session: Session, step: int, screen: Screen) -> None:
    """All steps after `step`, each in the metrics and every so many in a checkpoint."""
    done, stop = session.spent(step) >= 1, False
    with deferred(session.console) as interrupt:
        while not (done or stop):
            step += 1
            metrics = train_step(session, step)
            session.run.append_metrics(metrics)
            session.trackers.log(metrics, step)
            screen.step(metrics)
            done, stop = session.spent(step) >= 1, session.ranks.any(bool(interrupt.asked))
            if done or stop or step % session.recipe.checkpoint.every == 0:
                session.save(step)
    if stop:
        raise KeyboardInterrupt


def train_step(session: Session, step: int) -> dict[str, Any]:
    """One rollout and the updates on it."""
    recipe, clock = session.recipe, Clock()
    torch.manual_seed(grouping.sample_seed(recipe.seed, step))
    groups, rolled_out = _scored_groups(session, step, clock)
    advantages = [session.advantages(group) for group in groups]
    if recipe.log.groups:
        session.run.write_groups(step, groups, advantages)
    session.engine.sleep()
    with clock("train"):
        updates = _update(session, step, groups, advantages)
        memory = peak_memory(session.policy.device)
    kl = _monitor(session, step, groups)
    with clock("sync"):
        gap = None if session.offline else session.sync(step)
    _stop_if_bad(session, step, updates["skipped"], groups, advantages)
    return {
        "step": step,
        **group_metrics(groups),
        "rollout_tokens": rolled_out,
        **updates,
        "sync_gap": gap,
        "peak_memory": memory,
        **({"kl": kl} if kl else {}),
        "seconds": dict(clock.seconds),
    }


def _update(
    session: Session, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """The optimiser steps on one rollout."""
    policy, recipe = session.policy, session.recipe
    count = recipe.train.updates_per_rollout
    parts = _split(list(zip(groups, advantages, strict=True)), count)
    portions = [
        portion(policy, recipe, _rows(session, part), session.token_budget, session.ranks)
        for part in parts
    ]
    tokens = sum(len(response.token_ids) for group in groups for response in group)
    done = []
    for i, rows in enumerate(portions):
        middle = (i + 0.5) / len(portions)
        share = session.spent(step - 1 + middle, middle * tokens)
        budget = session.token_budget
        done.append(update(policy, session.optimizer, recipe, share, rows, budget, session.ranks))
        _lower_budget(session, done[-1].token_budget)
    session.tokens += tokens
    return combined(done)


def _lower_budget(session: Session, token_budget: int) -> None:
    """Stay with the smaller micro-batches that a step had to fall back on."""
    if token_budget < session.token_budget:
        session.console.print(
            f"out of memory: train.micro_batch_tokens lowered from {session.token_budget:,} to "
            f"{token_budget:,}, the step repeated"
        )
        session.token_budget = token_budget


def _dry_step(session: Session) -> None:
    """Forward and backward of the largest micro-batch that can come, before hours are spent."""
    recipe, policy = session.recipe, session.policy
    longest = max((p.prompt_ids for p in session.problems), key=len)
    answer = (policy.pad_id,) * recipe.rollout.max_tokens
    # Prompts differ in their first token, so that a group shares one and no more.
    rows = [
        Row((number, *longest[1:]), answer)
        for number in range(recipe.train.problems_per_step)
        for _ in range(recipe.group.size)
    ]
    batches = policy.batches(rows, session.token_budget)
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    rows = [rows[i] for i in largest.row.unique().tolist()]
    # Each process by itself, since each has a GPU of its own to try.
    budget = gradient(policy, recipe, rows, session.token_budget).token_budget
    _lower_budget(session, min(session.ranks.together([budget])))
    policy.model.zero_grad(set_to_none=True)


def _stop_if_bad(
    session: Session,
    step: int,
    skipped: str | None,
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float]],
) -> None:
    """Keep the groups of a step that gave no finite gradient; too many in a row end the run."""
    if "non_finite" not in (skipped or ""):
        session.bad_steps = 0
        return
    session.bad_steps += 1
    kept = session.run.save_bad_step(step, groups, advantages)
    session.console.print(f"step {step}: loss or gradient not finite, skipped; its groups: {kept}")
    if session.bad_steps >= session.recipe.optim.max_bad_steps:
        raise TrainError(
            f"optim.max_bad_steps: {session.bad_steps} steps in a row had a loss or gradient that "
            f"was not finite. Look at {kept}, or lower optim.lr."
        )


def _scored_groups(session: Session, step: int, clock: Clock) -> tuple[list[Group], int]:
    """The step's groups and the tokens sampled for them.

    Flat groups are replaced by other problems' where the recipe says so (dynamic sampling,
    arXiv 2503.14476), as often as it allows.
    """
    if session.offline:
        return session.offline.groups(turns(session.recipe, session.problems, step)), 0
    groups = _collect(session, step, 0, clock)
    rolled_out = own_tokens(groups)
    for attempt in range(1, session.recipe.rollout.resample + 1):
        if not any(group.flat for group in groups):
            break
        fresh = _collect(session, step, attempt, clock, sum(group.flat for group in groups))
        rolled_out += own_tokens(fresh)
        useful = iter([group for group in fresh if not group.flat])
        groups = [next(useful, group) if group.flat else group for group in groups]
    return groups, rolled_out


def _collect(
    session: Session, step: int, attempt: int, clock: Clock, count: int | None = None
) -> list[Group]:
    """Roll out and score `count` groups, by default all of a step."""
    recipe = session.recipe
    with clock("rollout"):
        groups = grouping.build(
            session.problems_of(step, attempt)[:count],
            recipe.group,
            (step - 1) * recipe.train.problems_per_step // len(session.problems),
            session.engine,
            session.format,
            session.sampling,
            (recipe.seed, step, attempt),
        )
    with clock("reward"):
        return session.score(groups)


def _split(items: list[Any], parts: int) -> list[list[Any]]:
    """`items` in `parts` nearly equal portions, empty ones left out."""
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(bounds) if b > a]


def _rows(session: Session, part: Sequence[tuple[Group, Sequence[float]]]) -> list[Row]:
    """The rows that one update trains on, weighted by the recipe's reduction."""
    masked = session.recipe.objective.mask_truncated
    rows = [
        (group.problem.prompt_ids, response.token_ids, advantage)
        for group, advantages in part
        for response, advantage in zip(group, advantages, strict=True)
        if response.token_ids and not (masked and response.truncated)
    ]
    weights = session.token_weights([len(ids) for _, ids, _ in rows])
    return [Row(*row, weight) for row, weight in zip(rows, weights, strict=True)]


def _monitor(session: Session, step: int, groups: Sequence[Group]) -> dict[str, Any]:
    """KL to the reference, every so many steps."""
    recipe = session.recipe
    every = recipe.monitor.every
    if not every or step % every:
        return {}
    held_out = {"held_out": _held_out_kl(session)}
    if session.offline:  # There are no samples of the policy.
        return held_out
    own = drift.divergence(
        session.policy, drift.group_rows(groups), session.token_budget,
        samples_of="policy",
    )  # fmt: skip
    return held_out | {"rollouts": own}


def _held_out_kl(session: Session) -> dict[str, float]:
    return drift.divergence(
        session.policy, session.kl_rows, session.token_budget, samples_of="reference"
    )


def peak_memory(device: torch.device) -> int:
    """The most memory in bytes that torch held on the GPU since it was last asked, or that the
    process held ever where there is no GPU."""
    if device.type != "cuda":
        return process_memory("VmHWM")
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


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
