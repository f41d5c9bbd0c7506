"""Checks that the engine serves the weights that the trainer has."""

from __future__ import annotations

import torch
from torch import Tensor

from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.batching import Row
from gft_lite.rollout.base import RolloutEngine, RolloutError


class SyncCheck:
    """Scores one fixed completion in trainer and engine and compares the log-probs.

    They never agree to the last bit (kernels, dtypes, a base published in another precision):
    `noise`, the gap while both serve the bare base, is what an engine without a fault shows.

    Raises: RolloutError if the base alone exceeds `limit`, in nats per token.
    """

    def __init__(self, policy: Policy, row: Row, limit: float, engine: RolloutEngine) -> None:
        self._policy = policy
        self._row = row
        self._limit = limit
        with policy.base():
            self._base = self._trainer_logprobs()
        self._previous = self._base
        engine.sync(None, 0)
        self._served_base = self._engine_logprobs(engine)
        self._served_previous = self._served_base
        self.noise = _gap(self._served_base, self._base)
        self._check_limit(self.noise)

    def check(self, engine: RolloutEngine) -> float:
        """The mean gap in nats for the adapter that was just synced.

        Raises: RolloutError if it exceeds the limit, or if the engine is closer to the base or
        to the previous adapter than to the new one, or serves what it did for one of them.
        """
        trainer, served = self._trainer_logprobs(), self._engine_logprobs(engine)
        gap = _gap(served, trainer)
        self._check_limit(gap)
        for what, old, served_old in (
            ("the base", self._base, self._served_base),
            ("the previous adapter", self._previous, self._served_previous),
        ):
            change = _gap(trainer, old)
            nearer = change > 4 * self.noise + 1e-5 and _gap(served, old) < gap
            # An engine in bfloat16 beside a trainer in fp32 has a noise above most changes, but a
            # smaller change than the noise changes its log-probs, too.
            unchanged = change > self.noise / 4 + 1e-5 and torch.equal(served, served_old)
            if nearer or unchanged:
                raise RolloutError(
                    f"rollout.engine: must serve the new adapter, got {what} "
                    f"(gap {gap:.2g} nats). The engine did not load the synced adapter."
                )
        self._previous, self._served_previous = trainer, served
        return gap

    def _check_limit(self, gap: float) -> None:
        if not gap <= self._limit:
            raise RolloutError(
                f"rollout.probe_limit: trainer and engine must agree within {self._limit} nats "
                f"per token, got {gap:.3g}. Check rollout.base, rollout.dtype and policy.dtype."
            )

    def _trainer_logprobs(self) -> Tensor:
        [batch] = self._policy.batches([self._row], 1)
        with torch.no_grad(), evaluating(self._policy):
            return self._policy.token_scores(batch).logprobs.cpu()

    def _engine_logprobs(self, engine: RolloutEngine) -> Tensor:
        return torch.tensor(engine.score(self._row.prompt_ids, self._row.response_ids))


def _gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()
