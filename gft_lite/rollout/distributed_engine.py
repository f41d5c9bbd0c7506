"""TODO: gft_lite/rollout/distributed_engine.py"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from gft_lite.rollout.base import Completion, Request, RolloutEngine, Sampling, Seen, ignore
from gft_lite.rollout.restarting_engine import RestartingEngine
from gft_lite.utils.distributed import Ranks


class SharedEngine(RestartingEngine):
    """The engines of all processes as one: requests are dealt out, completions come to all."""

    def __init__(self, start: Callable[[], RolloutEngine], console: Console, ranks: Ranks) -> None:
        super().__init__(start, console)
        self._ranks = ranks

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, seen: Seen = ignore
    ) -> list[list[Completion]]:
        """One list of completions per request, in the order of its seeds."""
        mine = self._ranks.share(requests)
        return self._ranks.together(super().generate(mine, sampling, seen) if mine else [])
