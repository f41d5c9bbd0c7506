"""Bytes that torch's operations hold, where there is no allocator to ask."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive.

    Tensors that are `known` don't count, whatever operations return them again.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        # Held, so that no other storage takes an address that is known.
        self._held = [tensor.untyped_storage() for tensor in known]
        self._seen = {storage._cdata for storage in self._held}
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """Run the operation and count what it made."""
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class Peak:
    """GiB that torch holds at the most inside the `with`: all of it on CUDA, by its allocator;
    on a CPU what is added to what `known` tensors hold."""

    def __init__(self, device: str, known: Iterable[Tensor] = ()) -> None:
        self._meter = Meter(known) if device == "cpu" else None
        self.gib = 0.0

    def __enter__(self) -> Peak:
        if self._meter:
            self._meter.__enter__()
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._meter:
            self._meter.__exit__(*error)
            peak = self._meter.peak
        else:
            peak = torch.cuda.max_memory_allocated()
        self.gib = peak / 2**30
