"""KL of the policy to the frozen reference, every few steps, on fixed held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Row
from gft_lite.policy.kl import divergence, group_rows
from gft_lite.recipe.schema import Recipe
from gft_lite.types import Group


class KlMonitor:
    """Measures KL on the reference's own responses (`rows`) and on the step's self samples."""

    def __init__(self, policy: Policy, recipe: Recipe, rows: Sequence[Row]) -> None:
        self.policy = policy
        self.rows = rows
        self._every = recipe.monitor.every
        self._sampled = recipe.group.offline is None

    def measure(
        self, step: int, groups: Sequence[Group], micro_batch_tokens: int
    ) -> dict[str, Any]:
        """KL in nats per token every `monitor.every` steps; empty at other steps."""
        if not self._every or step % self._every:
            return {}
        held_out = {"held_out": self.held_out(micro_batch_tokens)}
        if not self._sampled:  # Presampled groups are not the policy's own.
            return held_out
        rows = group_rows(groups)
        own = divergence(self.policy, rows, micro_batch_tokens, samples_of="policy")
        return held_out | {"rollouts": own}

    def held_out(self, micro_batch_tokens: int) -> dict[str, float]:
        """KL on the reference's responses to the held-out prompts."""
        return divergence(self.policy, self.rows, micro_batch_tokens, samples_of="reference")
