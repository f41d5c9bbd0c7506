"""The processes that train one policy together, each on its own GPU: `accelerate launch`.

All of them run the same loop. Dealt out are requests to the rollout engines, groups to grade and
micro-batches; all else each does for itself, from the same numbers.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from gft_lite.utils.files import cached

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # How long the others wait for the slowest; torch's own is minutes.


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of `count` processes this one is, and which of `neighbours` on its own machine."""

    index: int = 0
    count: int = 1
    local: int = 0
    neighbours: int = 1

    @property
    def main(self) -> bool:
        """Whether it is the one that writes the run's files and talks to the user."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of what all have: every `count`-th item."""
        return items[self.index :: self.count]

    def together(self, part: Sequence[T]) -> list[T]:
        """The shares of all processes, put together again."""
        if self.count == 1:
            return list(part)
        from accelerate.utils import gather_object

        parts = gather_object([list(part)])
        whole: list[Any] = [None] * sum(map(len, parts))
        for index, share in enumerate(parts):
            whole[index :: self.count] = share
        return whole

    def of_main(self, compute: Callable[[], T]) -> T:
        """What the main process computes, for all."""
        return self.together([compute()] if self.main else [])[0]

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes."""
        return any(self.together([flag]))

    def wait(self) -> None:
        """Until all are here."""
        self.together([None])

    def cached(self, path: Path, compute: Callable[[], Any]) -> Any:
        """The JSON at `path`; where it is not there yet, all compute it and the main one writes."""
        value = None if self.of_main(path.exists) else compute()
        return self.of_main(lambda: cached(path, lambda: value))

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make each tensor its sum over the processes, in place."""
        from accelerate.utils import reduce

        whole: Any = reduce(torch.cat([t.flatten() for t in tensors]), reduction="sum")
        for tensor, part in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Ranks()


def find_ranks(device: str) -> Ranks:
    """Join the processes that `accelerate launch` has started, if it has, to train on `device`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    first = not torch.distributed.is_initialized()
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    if first:
        # Gloo's threads would abort a process that ends with them.
        atexit.register(state.destroy_process_group)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(state.process_index, state.num_processes, state.local_process_index, neighbours)
