"""An engine that is restarted when it fails."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from gft_lite.rollout.base import (
    Completion,
    EngineFailed,
    OnCompletion,
    Request,
    RolloutEngine,
    Sampling,
    noop,
)
from gft_lite.utils.progress import show_sampling

T = TypeVar("T")


class RestartingEngine:
    """Replaces a failed engine by a fresh one; a second failure in one call is raised.

    Samples depend only on adapter, prompt and seed: those from before the failure are kept, and the
    fresh engine gives the rest as the first would have. `on_restart` is called with the fresh
    engine once it serves the adapter again.
    """

    def __init__(self, start: Callable[[], RolloutEngine], console: Console) -> None:
        self._start = start
        self._console = console
        self._engine = start()
        self._served: tuple[Path, int] | None = None
        self.name, self.base = self._engine.name, self._engine.base
        self.adapter_dtype = getattr(self._engine, "adapter_dtype", None)
        self.on_restart: Callable[[RolloutEngine], object] | None = None

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the adapter saved at `adapter` from now on; None serves the base."""
        self._repeated(lambda: self._engine.sync(adapter, version), lambda: None)
        self._served = None if adapter is None else (adapter, version)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: OnCompletion = noop
    ) -> list[list[Completion]]:
        """One list of completions per request, in the order of its seeds."""
        done: dict[tuple[tuple[int, ...], int], Completion] = {}
        total = sum(len(request.seeds) for request in requests)
        with show_sampling(self._console, total) as show:

            def record(prompt_ids: tuple[int, ...], seed: int, completion: Completion) -> None:
                done[prompt_ids, seed] = completion
                show(len(completion.token_ids))
                on_completion(prompt_ids, seed, completion)

            def generate() -> None:
                missing = [_without(request, done) for request in requests]
                found = self._engine.generate(missing, sampling, record)
                for request, completions in zip(missing, found, strict=True):
                    for seed, completion in zip(request.seeds, completions, strict=True):
                        done[request.prompt_ids, seed] = completion

            self._repeated(generate, self._serve_and_check)
        return [[done[request.prompt_ids, s] for s in request.seeds] for request in requests]

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] in nats of `token_ids` after the prompt, under what is served."""
        return self._repeated(
            lambda: self._engine.score(prompt_ids, token_ids), self._serve_and_check
        )

    def sleep(self) -> None:
        """Release the memory of the device until `wake`."""
        self._engine.sleep()

    def wake(self) -> None:
        """Reload what was served before the sleep."""
        # Not checked: the trainer has other weights by now.
        self._repeated(lambda: self._engine.wake(), self._serve)

    def close(self) -> None:
        """Release everything; may be called twice."""
        self._engine.close()

    def _repeated(self, call: Callable[[], T], restore: Callable[[], None]) -> T:
        try:
            return call()
        except EngineFailed as error:
            self._console.print(f"{error} Starting it again.", markup=False, soft_wrap=True)
        self._engine = self._start()
        restore()
        return call()

    def _serve(self) -> None:
        """Make the fresh engine serve what the failed one did."""
        if self._served is not None:
            self._engine.sync(*self._served)

    def _serve_and_check(self) -> None:
        self._serve()
        if self._served is not None and self.on_restart is not None:
            self.on_restart(self._engine)


def _without(request: Request, done: Container[tuple[tuple[int, ...], int]]) -> Request:
    """The request without the seeds that are done."""
    seeds = (seed for seed in request.seeds if (request.prompt_ids, seed) not in done)
    return Request(request.prompt_ids, tuple(seeds))
