"""The one owner of what the trainer does with its engine: sync, check, sleep and wake, close."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Row
from gft_lite.rollout.base import RolloutEngine
from gft_lite.rollout.sync_check import SyncCheck


class PolicyEngine:
    """Keeps a rollout engine serving the policy that is being trained.

    Requests go to `sampler`. `adapters` is a folder for the synced adapters.
    """

    def __init__(self, sampler: RolloutEngine, policy: Policy, adapters: Path) -> None:
        self.sampler = sampler
        self._policy = policy
        self._adapters = adapters
        self._check: SyncCheck | None = None

    def start_checks(self, row: Row, limit: float) -> float:
        """Check every sync on `row` from now on; returns the gap of the bare base in nats.

        Raises: RolloutError if it exceeds `limit`.
        """
        self._check = SyncCheck(self._policy, row, limit, self.sampler)
        return self._check.noise

    @property
    def about(self) -> str:
        """The engine, its copy of the base, and the gap of `start_checks`, for the console."""
        gap = f"{self._check.noise:.2g} nats" if self._check else "not measured"
        return f"engine: {self.sampler.name}, base {self.sampler.base}, log-prob gap {gap}"

    def check(self, engine: RolloutEngine) -> float:
        """The gap in nats of what `engine` serves to the policy, after `start_checks`.

        Raises: RolloutError if it is not the policy.
        """
        if self._check is None:
            raise RuntimeError("start_checks must be called before check and sync")
        return self._check.check(engine)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Leave the device's memory to the trainer for the length of a `with`.

        After an exception the engine stays asleep: the run ends.
        """
        self.sampler.sleep()
        yield
        self.sampler.wake()

    def sync(self, version: int) -> float:
        """Serve the policy's current adapter, check it, and return its gap in nats.

        Raises: RolloutError if the engine does not serve the adapter.
        """
        self.sync_unchecked(version)
        return self.check(self.sampler)

    def sync_unchecked(self, version: int) -> None:
        """Serve the policy's current adapter, in the engine's precision.

        Every version has a path of its own; the one before it is removed only afterwards, since
        the engine may read it until then.
        """
        dtype = getattr(self.sampler, "adapter_dtype", None)
        fresh = self._policy.save_adapter(self._adapters / f"v{version}", dtype=dtype)
        self.sampler.sync(fresh, version)
        for old in self._adapters.glob("v*"):
            if old != fresh:
                shutil.rmtree(old)

    def rest(self) -> None:
        """Serve the base, for a later run, and leave the device's memory to the trainer."""
        self.sampler.sync(None, 0)
        self.sampler.sleep()

    def close(self) -> None:
        """Release all that the engine holds; may be called twice, and while asleep."""
        self.sampler.close()
