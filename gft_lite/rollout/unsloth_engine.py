"""Rollouts with the vLLM that Unsloth has started on the trainer's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gft_lite.rollout.base import RolloutError
from gft_lite.rollout.vllm_engine import VllmEngine

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import RolloutSettings


class UnslothEngine(VllmEngine):
    """Shares the policy's weights and loads adapters only; never sleeps, since training uses the
    same weights."""

    name = "unsloth"

    def _start(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> Any:
        self._can_sleep, self._model = False, policy.model
        self.base = "the trainer's own"
        engine = getattr(policy.model, "vllm_engine", None)
        if engine is None:
            raise RolloutError(
                "rollout.engine: unsloth must have the vllm that policy.backend unsloth starts, "
                "once, with the policy. Continue the run with --resume, or set "
                "rollout.engine=vllm."
            )
        return engine

    def take_over(self, settings: RolloutSettings, policy: Policy) -> bool:
        """Return False: the engine belongs to its policy."""
        return False

    def close(self) -> None:
        """Reject further calls; the memory belongs to the policy."""
        self._llm = self._lora = self._model.vllm_engine = None
