"""An engine that is started again when it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
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

T = TypeVar("T")

REFRESH = 0.2  # Seconds.


class RestartingEngine:
    """Goes on with a fresh engine where one failed; a second failure in a call stands.

    Samples depend on nothing but adapter, prompt and seed: those that were there before the
    failure stay, and the fresh engine answers for the rest what the first would have. `check`
    hears of the fresh engine once it serves the adapter again.
    """

    def __init__(self, start: Callable[[], RolloutEngine], console: Console) -> None:
        self._start = start
        self._console = console
        self._engine = start()
        self._served: tuple[Path, int] | None = None
        self.name, self.base = self._engine.name, self._engine.base
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
        with _shown(self._console, sum(len(request.seeds) for request in requests)) as show:

            def note(prompt_ids: tuple[int, ...], seed: int, completion: Completion) -> None:
                done[prompt_ids, seed] = completion
                show(completion)
                on_completion(prompt_ids, seed, completion)

            def ask() -> None:
                missing = [_without(request, done) for request in requests]
                found = self._engine.generate(missing, sampling, note)
                for request, completions in zip(missing, found, strict=True):
                    for seed, completion in zip(request.seeds, completions, strict=True):
                        done[request.prompt_ids, seed] = completion

            self._repeated(ask, self._serve_and_check)
        return [[done[request.prompt_ids, s] for s in request.seeds] for request in requests]

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] in nats of `token_ids` after the prompt, under what is served."""
        return self._repeated(
            lambda: self._engine.score(prompt_ids, token_ids), self._serve_and_check
        )

    def sleep(self) -> None:
        """Give the device's memory back until `wake`."""
        self._engine.sleep()

    def wake(self) -> None:
        """Serve again what was served before."""
        # Not checked: the trainer has gone on meanwhile.
        self._repeated(lambda: self._engine.wake(), self._serve)

    def close(self) -> None:
        """Give everything back; may be called twice."""
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
        """Have the fresh engine serve what the one before did."""
        if self._served is not None:
            self._engine.sync(*self._served)

    def _serve_and_check(self) -> None:
        self._serve()
        if self._served is not None and self.on_restart is not None:
            self.on_restart(self._engine)


def _without(request: Request, done: Container[tuple[tuple[int, ...], int]]) -> Request:
    """A request without the seeds that have been answered."""
    seeds = (seed for seed in request.seeds if (request.prompt_ids, seed) not in done)
    return Request(request.prompt_ids, tuple(seeds))


@contextmanager
def _shown(console: Console, total: int) -> Iterator[Callable[[Completion], None]]:
    """A line that tells, on a terminal, how far a call is, for the length of a `with`."""
    started = time.perf_counter()
    last, responses, tokens = started, 0, 0
    with console.status(f"sampling {total:,} responses") as status:

        def show(completion: Completion) -> None:
            nonlocal last, responses, tokens
            responses, tokens = responses + 1, tokens + len(completion.token_ids)
            now = time.perf_counter()
            if now - last > REFRESH:
                last, speed = now, tokens / (now - started)
                status.update(
                    f"sampling: {responses:,} of {total:,} responses, {tokens:,} tokens, "
                    f"{speed:,.0f} tokens/s"
                )

        yield show
