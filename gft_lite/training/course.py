"""What follows a step of training: the collapse guard, evaluations, and the end by one of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gft_lite.runs.console import evaluation_line
from gft_lite.runs.metrics import PhaseTimer
from gft_lite.training.setup import TrainingRun
from gft_lite.utils.progress import show_phase


def check_guard(run: TrainingRun, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """The collapse guard's new alarms in this step and its action, as metrics."""
    own = run.guard.check(metrics)
    alarms = run.distributed.broadcast_from_main(lambda: own)
    if not alarms:
        return {}
    action, scale = run.guard.action, run.guard.lr_scale
    found: dict[str, Any] = {"guard": {"alarms": list(alarms), "action": action}}
    consequence = {"warn": "training goes on", "stop": "training ends"}.get(action)
    if action == "rollback":
        found["guard"]["restored"] = restored = run.roll_back(step)
        run.guard.record(found)
        run.learner.lr_scale = scale = run.guard.lr_scale
        consequence = f"back to the policy of step {restored}, learning rate times {scale:g}"
    elif action == "stop":
        found["stopped"] = "guard"
    texts = "; ".join(f"{name}: {text}" for name, text in alarms.items())
    run.print(f"step {step}: guard: {texts}; {consequence}")
    return found


def evaluate_step(
    run: TrainingRun, step: int, metrics: dict[str, Any], *, last: bool
) -> dict[str, Any]:
    """The evaluation after this step where one is due, and whether it ends training, as metrics."""
    if not run.schedule.is_due(step, last=last):
        return {}
    timer = PhaseTimer()
    with timer("eval"), show_phase(run.console, f"step {step:,}: evaluating", announce=False):
        found = run.schedule.run(step)
    found["seconds"] = metrics["seconds"] | timer.seconds
    run.print(f"step {step}: {evaluation_line(found['eval'])}")
    reason = None if last else run.schedule.stop_reason()
    if reason:
        run.print(reason)
        found["stopped"] = "early_stop"
    return found


def course_summary(run: TrainingRun, final: int) -> dict[str, Any]:
    """What evaluations while training and the collapse guard made of the run, for its summary.

    `final` is the step of the policy that the run ends with.
    """
    metrics = run.folder.metrics()
    events = [m["guard"] for m in metrics if "guard" in m]
    best = {"best_step": run.schedule.best_step} if run.schedule.keeps_best else {}
    return {
        "policy_of_step": final,
        **best,
        "stopped": metrics[-1].get("stopped") if metrics else None,
        "guard": {
            "alarms": dict(Counter(name for event in events for name in event["alarms"])),
            "rollbacks": sum("restored" in event for event in events),
        },
    }
