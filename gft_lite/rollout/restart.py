"""An engine that is started again when it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from gft_lite.rollout import Completion, Request, RolloutEngine, RolloutError, Sampling

T = TypeVar("T")


class EngineFailed(RolloutError):
    """The engine broke down at a request that was fine, and has been closed."""


class RestartingEngine:
    """Repeats the call at which an engine failed on a fresh one; a second failure at it stands.

    Samples depend on nothing but adapter, prompt and seed, so a repeated call answers what the
    first would have. `check` hears of the fresh engine once it serves the adapter again.
    """

    def __init__(self, start: Callable[[], RolloutEngine], console: Console) -> None:
        self._start = start
        self._console = console
        self._engine = start()
        self._served: tuple[Path, int] | None = None
        self.name = self._engine.name
        self.check: Callable[[RolloutEngine], float] | None = None

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the adapter saved at `adapter` from now on; None serves the base."""
        self._engine.sync(adapter, version)
        self._served = None if adapter is None else (adapter, version)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """One list of completions per request, in the order of its seeds."""
        return self._repeated(lambda: self._engine.generate(requests, sampling))

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] in nats of `token_ids` after the prompt, under what is served."""
        return self._repeated(lambda: self._engine.score(prompt_ids, token_ids))

    def close(self) -> None:
        """Give everything back; may be called twice."""
        self._engine.close()

    def _repeated(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except EngineFailed as error:
            self._console.print(f"{error} Starting it again.", markup=False, soft_wrap=True)
        self._engine = self._start()
        if self._served is not None:
            self._engine.sync(*self._served)
            if self.check is not None:
                self.check(self._engine)
        return call()
