"""The training loop. A step: rollout, scores, advantages, update, KL, sync."""

from __future__ import annotations

from typing import Any

import torch

from gft_lite.objective.methods import find_method
from gft_lite.rollout.sampling import sample_seed
from gft_lite.runs.console import TrainingConsole
from gft_lite.runs.metrics import PhaseTimer, group_metrics
from gft_lite.training.course import check_guard, evaluate_step
from gft_lite.training.ledger import record_tokens
from gft_lite.training.setup import TrainingRun
from gft_lite.training.updates import aggregate_updates
from gft_lite.types import ScoredGroup
from gft_lite.utils.memory import peak_memory
from gft_lite.utils.progress import show_phase
from gft_lite.utils.signals import defer_signals

GAP_WARNING = 0.1  # In nats per token.


class TrainError(RuntimeError):
    """Training can't go on; the last checkpoint holds."""


def train_steps(run: TrainingRun, step: int, screen: TrainingConsole) -> int:
    """All steps after `step`, with metrics for each and a checkpoint every few; the last step.

    Raises: KeyboardInterrupt after the current step is saved, if a signal asked for a stop.
    """
    done, stop = run.is_over(step), False
    with defer_signals(run.console) as interrupt:
        while not (done or stop):
            step += 1
            with show_phase(run.console, f"step {step:,}", announce=False):
                metrics = train_step(run, step)
            run.count_seconds([metrics])
            spent = run.learner.budget_fraction(step) >= 1
            metrics |= check_guard(run, step, metrics)
            metrics |= evaluate_step(run, step, metrics, last=spent or "stopped" in metrics)
            run.folder.append_metrics(metrics)
            run.trackers.log(metrics, step)
            screen.step(metrics)
            done = spent or "stopped" in metrics
            stop = run.distributed.any(bool(interrupt.received))
            changed = "restored" in metrics.get("guard", {}) or run.schedule.is_new_best(step)
            if done or stop or changed or step % run.recipe.checkpoint.every == 0:
                run.save_checkpoint(step)
    if stop:
        raise KeyboardInterrupt
    return step


def train_step(run: TrainingRun, step: int) -> dict[str, Any]:
    """One rollout and the updates on it; returns the step's metrics."""
    timer = PhaseTimer()
    torch.manual_seed(sample_seed(run.recipe.seed, step))
    built = run.builder.build(step, timer, run.learner.budget_fraction(step - 1))
    groups = built.groups
    if run.recipe.log.groups:
        run.folder.write_groups(step, groups)
    run.trackers.log_groups(step, groups)
    with run.engine.asleep():
        if run.recipe.log.tokens:
            with timer("train"):
                record_tokens(run.learner, run.folder, step, groups)
        with timer("train"), show_phase(run.console, "training", announce=False):
            updates = aggregate_updates(
                run.learner.train_on(step, groups), run.learner.loss.importance
            )
            memory = peak_memory(run.policy.device)
        with show_phase(run.console, "KL", announce=False):
            kl = run.monitor.measure(
                step, [scored.group for scored in groups], run.learner.micro_batch_tokens
            )
    with timer("sync"):
        gap = None if run.builder.presampled else run.engine.sync(step)
    _warn_without_rewards(run, step, groups)
    _stop_after_bad_steps(run, step, groups)
    _check_engine_gap(run, step, updates["engine_gap"])
    return {
        "step": step,
        **group_metrics([scored.group for scored in groups]),
        "rollout_tokens": built.rollout_tokens,
        **updates,
        **run.grading.judge_usage(),
        "sync_gap": gap,
        "peak_memory": memory,
        **({"kl": kl} if kl else {}),
        "seconds": dict(timer.seconds),
    }


def _warn_without_rewards(run: TrainingRun, step: int, groups: list[ScoredGroup]) -> None:
    if not find_method(run.recipe.method).group_advantages:
        return  # It learns from demonstrations, which need no answers.
    responses = [response for scored in groups for response, _ in scored]
    if all(response.verdict == "not_applicable" for response in responses):
        run.print(
            f"step {step}: no reward function applied to any of the {len(responses)} responses, "
            "so that nothing was learned from them. Check reward.functions."
        )


def _check_engine_gap(run: TrainingRun, step: int, gap: dict[str, float] | None) -> None:
    """Warn of engine log-probs that are not the trainer's; stop where they are too far away."""
    if gap is None or gap["mean"] <= GAP_WARNING or run.builder.presampled:
        return
    found = f"step {step}: engine and trainer differ by {gap['mean']:.2g} nats per sampled token"
    limit = run.recipe.rollout.probe_limit
    if gap["mean"] > limit:
        raise TrainError(f"rollout.probe_limit: {found}, more than {limit}.")
    run.print(f"{found}; see objective.importance, rollout.base and policy.dtype")


def _stop_after_bad_steps(run: TrainingRun, step: int, groups: list[ScoredGroup]) -> None:
    """Keep the groups of a step without a finite gradient; too many in a row end the run."""
    bad = run.learner.bad_steps
    if not bad:
        return
    file = run.folder.save_bad_step(step, groups)
    run.console.print(
        f"step {step}: loss or gradient not finite, step skipped; its groups are in {file}"
    )
    if bad >= run.recipe.optim.max_bad_steps:
        raise TrainError(
            f"optim.max_bad_steps: {bad} steps in a row had a loss or gradient that was not "
            f"finite. Look at {file}, or lower optim.lr."
        )
