"""The processes that train one policy together, each on its own GPU (`accelerate launch`).

All processes run the same loop. Requests to the rollout engines, groups to grade and micro-batches
are sharded; everything else each process computes for itself from the same numbers.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gft_lite.utils.files import cached_json

if TYPE_CHECKING:  # A run's folder is found and checked before torch is imported.
    import torch

T = TypeVar("T")
# How long a process waits for the slowest; torch's default of minutes is too short for a rollout.
TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True, slots=True)
class Distributed:
    """The rank of this process among `world_size`, and among those on the same machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the process that writes the run's files and prints."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of `items`: every `world_size`-th item, from `rank`."""
        return items[self.rank :: self.world_size]

    def all_gather(self, part: Sequence[T]) -> list[T]:
        """The shards of all processes merged in their original order."""
        if self.world_size == 1:
            return list(part)
        from accelerate.utils import gather_object

        parts = gather_object([list(part)])
        whole: list[Any] = [None] * sum(map(len, parts))
        for rank, shard in enumerate(parts):
            whole[rank :: self.world_size] = shard
        return whole

    def broadcast_from_main(self, compute: Callable[[], T]) -> T:
        """The value that the main process computes, in every process."""
        return self.all_gather([compute()] if self.is_main else [])[0]

    def any(self, flag: bool) -> bool:
        """True if `flag` is true in at least one process."""
        return any(self.all_gather([flag]))

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        self.all_gather([None])

    def cached_json(
        self, path: Path, compute: Callable[[], Any], read: Callable[[Path], Any] | None = None
    ) -> Any:
        """The JSON at `path`; if missing, all processes compute it and the main one writes it.

        `read` reads and checks the file.
        """
        value = None if self.broadcast_from_main(path.exists) else compute()
        return self.broadcast_from_main(lambda: cached_json(path, lambda: value, read))

    def all_reduce_sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place."""
        import torch
        from accelerate.utils import reduce

        whole: Any = reduce(torch.cat([t.flatten() for t in tensors]), reduction="sum")
        for tensor, part in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


SINGLE_PROCESS = Distributed()


def init_distributed(device: str) -> Distributed:
    """Join the process group that `accelerate launch` has prepared, if any, for `device`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SINGLE_PROCESS
    import torch
    from accelerate import PartialState

    first = not torch.distributed.is_initialized()
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=TIMEOUT)
    if first:
        # A process that ends inside the group is aborted by gloo's threads.
        atexit.register(state.destroy_process_group)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Distributed(
        state.process_index, state.num_processes, state.local_process_index, local_world_size
    )
