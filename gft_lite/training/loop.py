"""The loop: roll out, score, advantages, update, sync; readable from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gft_lite.rollout.sampling import sample_seed
from gft_lite.runs.console import Screen
from gft_lite.runs.metrics import Clock, group_metrics, own_tokens
from gft_lite.training import groups as grouping
from gft_lite.training.kl_monitor import _monitor
from gft_lite.training.learner import _update
from gft_lite.training.offline_groups import turns
from gft_lite.training.session import Session
from gft_lite.types import Group
from gft_lite.utils.memory import peak_memory
from gft_lite.utils.signals import deferred


class TrainError(RuntimeError):
    """Training can't go on; the last checkpoint holds."""


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
            done, stop = session.spent(step) >= 1, session.distributed.any(bool(interrupt.asked))
            if done or stop or step % session.recipe.checkpoint.every == 0:
                session.save(step)
    if stop:
        raise KeyboardInterrupt


def train_step(session: Session, step: int) -> dict[str, Any]:
    """One rollout and the updates on it."""
    recipe, clock = session.recipe, Clock()
    torch.manual_seed(sample_seed(recipe.seed, step))
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
