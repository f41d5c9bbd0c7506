"""The base and the engine that consecutive runs of one process use in turn."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gft_lite.policy.base import Policy
from gft_lite.policy.kept_base import KeptBase
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout.base import RolloutEngine
from gft_lite.rollout.registry import start_engine
from gft_lite.utils.memory import trim_heap

# Prompt and completion that an engine scores with the base at its start and whenever it is reused.
# The ids are in every vocabulary, the length in every context.
_PROBE = (0, 1, 2), (3, 2, 1)
_KEPT = "of the run before"

_log = logging.getLogger(__name__)


class SharedParts:
    """What a run has loaded and started, for the next run with equal inputs.

    A run gets the parts as a fresh start would give them, with an adapter and an optimiser of its
    own. Only the parts of a run that called `keep` are used again, at most one base and one engine;
    those that don't fit are closed before others are loaded.
    """

    def __init__(self) -> None:
        self._base = KeptBase()
        self._policy: Policy | None = None  # Of the current run, as is `_engine`.
        self._engine: RolloutEngine | None = None
        self._idle: Any = None  # An engine with `take_over`, asleep.
        self._served: list[float] = []
        self._free = 0, 0
        self._origins = {"base": "", "engine": ""}

    @property
    def about(self) -> str:
        """Whether base and engine of the current run are its own, for the console."""
        return ", ".join(f"{part}: {origin}" for part, origin in self._origins.items())

    def free_memory(self, measure: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        """`measure()` before anything was loaded, so that runs that share parts plan alike."""
        if self._base.is_empty:
            self._free = measure()
        return self._free

    def load_policy(self, settings: PolicySettings, seed: int, rollout: RolloutSettings) -> Policy:
        """A new policy, on the kept base if that fits. Raises: RecipeError."""
        fits = self._base.fits(settings)
        self._origins["base"] = _KEPT if fits else "loaded"
        if not fits:
            self.close()
        self._policy = load_policy(settings, seed, rollout, self._base)
        return self._policy

    def start_engine(
        self, settings: RolloutSettings, policy: Policy, scratch: Path
    ) -> RolloutEngine:
        """The kept engine, serving the base, or a new one. Raises: RolloutError."""
        idle, self._idle = self._idle, None
        if idle and idle.take_over(settings, policy) and idle.score(*_PROBE) == self._served:
            self._engine, self._origins["engine"] = idle, _KEPT
            return idle
        if idle:
            _log.debug("The engine of the previous run is not used again.")
            idle.close()
        self._engine, self._origins["engine"] = start_engine(settings, policy, scratch), "started"
        if hasattr(self._engine, "take_over"):
            self._served = self._engine.score(*_PROBE)
        return self._engine

    def keep(self) -> None:
        """Keep base and engine of a run that has ended well; the run must not use them any more."""
        policy, engine = self._policy, self._engine
        self._policy = self._engine = None
        if policy is None or engine is None:
            return
        if self._base.put_back(policy) and hasattr(engine, "take_over"):
            self._idle = engine
            # vLLM's start excluded all objects from garbage collection, also those of this run.
            gc.unfreeze()
        else:
            engine.close()

    def close(self) -> None:
        """Release everything; may be called twice."""
        if self._policy is None and self._idle is None and self._base.is_empty:
            return
        for engine in (self._idle, self._engine):
            if engine is not None:
                engine.close()
        self._policy = self._engine = self._idle = None
        self._base.drop()
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trim_heap()

    def __enter__(self) -> SharedParts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
