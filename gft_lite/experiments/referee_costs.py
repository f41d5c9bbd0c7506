"""What a referee will take: runs, responses, time and disk."""

from __future__ import annotations

from pathlib import Path

from gft_lite.experiments.referee_plan import RefereePlan


def plan_text(plan: RefereePlan, out: Path) -> str:
    """The plan as text."""
    return f"{plan.tuning_runs} + {plan.main_runs} runs"
