"""The engines of all processes as one engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from gft_lite.rollout.base import Completion, OnCompletion, Request, RolloutEngine, Sampling, noop
from gft_lite.rollout.restarting_engine import RestartingEngine
from gft_lite.utils.distributed import Distributed


class DistributedEngine(RestartingEngine):
    """Shards requests over the engines of all processes; every process gets all completions."""

    def __init__(
        self, start: Callable[[], RolloutEngine], console: Console, distributed: Distributed
    ) -> None:
        super().__init__(start, console)
        self._distributed = distributed

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: OnCompletion = noop
    ) -> list[list[Completion]]:
        """One list of completions per request, in the order of its seeds."""
        mine = self._distributed.shard(requests)
        return self._distributed.all_gather(
            super().generate(mine, sampling, on_completion) if mine else []
        )
