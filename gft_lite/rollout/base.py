"""TODO: gft_lite/rollout/base.py"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gft_lite.types import FinishReason


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued `len(seeds)` times; each sample has its own seed."""

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy, `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine sampled.

    `token_ids` includes the end-of-sequence token or the stop string's tokens;
    `logprobs` are one per token, in nats, of the untempered distribution (temperature 1,
    no top-p/top-k), whatever the sampling was.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


OnCompletion = Callable[[tuple[int, ...], int, Completion], None]


def noop(prompt_ids: tuple[int, ...], seed: int, completion: Completion) -> None:
    """The default: no callback per completion."""


class RolloutError(RuntimeError):
    """The engine failed, or serves something else than the trainer's adapter."""


class RolloutEngine(Protocol):
    """Samples from the base or from the newest synced adapter, never from a mixture.

    `base` says in words which copy of the base it serves.
    """

    name: str
    base: str

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the adapter saved at `adapter` from now on; None serves the base."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: OnCompletion = noop
    ) -> list[list[Completion]]:
        """One list of completions per request, in the order of its seeds.

        `on_completion` is called with the prompt, seed and completion of each, in any order.
        """

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] in nats of `token_ids` after the prompt, under what is served."""

    def sleep(self) -> None:
        """Give the device's memory back until `wake`, and answer no request until then."""

    def wake(self) -> None:
        """Serve again what was served before."""

    def close(self) -> None:
        """Give everything back; may be called twice, and while asleep."""
