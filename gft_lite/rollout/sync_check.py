"""After every sync: does the engine serve what the trainer has?"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.batching import Row
from gft_lite.rollout.base import RolloutEngine, RolloutError


class Probe:
    """Scores one fixed completion in trainer and engine and compares.

    Engine and trainer never agree to the last bit (kernels, dtypes, a base that was published
    in another precision); `noise`, the gap while both serve the bare base, says how far off
    an engine that does nothing wrong is.
    """

    def __init__(self, policy: Policy, row: Row, limit: float) -> None:
        self._policy = policy
        self._row = row
        self._limit = limit
        with policy.base():
            self._base = self._trainer()
        self._previous = self._base
        self.noise = 0.0

    def calibrate(self, engine: RolloutEngine) -> float:
        """The mean gap in nats while the engine serves the base. Raises: RolloutError."""
        engine.sync(None, 0)
        self.noise = self._gap(self._engine(engine), self._base)
        self._within_limit(self.noise)
        return self.noise

    def check(self, engine: RolloutEngine) -> float:
        """The mean gap in nats for the adapter that was just synced.

        Raises: RolloutError if it exceeds the limit, or if the engine is closer to the base or
        to the previous adapter than to the new one.
        """
        trainer, served = self._trainer(), self._engine(engine)
        gap = self._gap(served, trainer)
        self._within_limit(gap)
        for what, old in (("the base", self._base), ("the previous adapter", self._previous)):
            told_apart = self._gap(trainer, old) > 4 * self.noise + 1e-5
            if told_apart and self._gap(served, old) < gap:
                raise RolloutError(
                    f"rollout.engine: must serve the new adapter, got {what} "
                    f"(gap {gap:.2g} nats). The engine did not take up the sync."
                )
        self._previous = trainer
        return gap

    def _within_limit(self, gap: float) -> None:
        if not gap <= self._limit:
            raise RolloutError(
                f"rollout.probe_limit: trainer and engine must agree within {self._limit} nats "
                f"per token, got {gap:.3g}. Check rollout.base and policy.dtype."
            )

    def _trainer(self) -> Tensor:
        [batch] = self._policy.batches([self._row], 1)
        with torch.no_grad(), evaluating(self._policy):
            return self._policy.token_scores(batch).logprobs.cpu()

    def _engine(self, engine: RolloutEngine) -> Tensor:
        return torch.tensor(engine.score(self._row.prompt_ids, self._row.response_ids))

    @staticmethod
    def _gap(a: Tensor, b: Tensor) -> float:
        return (a - b).abs().mean().item()


def sync(engine: RolloutEngine, policy: Policy, adapters: Path, version: int) -> None:
    """Save the policy's adapter under a fresh path and let the engine, awake again, serve it.

    The folder of the version before goes only afterwards: the engine may read it until then.
    """
    engine.wake()
    fresh = policy.save_adapter(adapters / f"v{version}")
    engine.sync(fresh, version)
    for old in adapters.glob("v*"):
        if old != fresh:
            shutil.rmtree(old)
