"""TODO: gft_lite/training/kl_monitor.py"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gft_lite.policy import kl as drift
from gft_lite.training.session import Session
from gft_lite.types import Group


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
