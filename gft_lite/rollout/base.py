"""The protocol of a rollout engine, and the values that go in and come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gft_lite.types import FinishReason

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to sample `len(seeds)` completions of, one for each seed."""

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; `top_k` 0 and `top_p` 1 disable the filter.

    A completion ends with its first end token, with the token that completes the first stop
    string, after `max_tokens` tokens, or where the context is full.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    `token_ids` [T] includes the end token, or all tokens of the stop string; `logprobs` [T] are
    in nats, of the untempered distribution (temperature 1, no top-p or top-k) for any `Sampling`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


OnCompletion = Callable[[tuple[int, ...], int, Completion], None]


def noop(prompt_ids: tuple[int, ...], seed: int, completion: Completion) -> None:
    """Do nothing: the default `OnCompletion`."""


class RolloutError(RuntimeError):
    """The engine failed, or serves other weights than the trainer's adapter."""


class EngineFailed(RolloutError):
    """The engine broke down on a valid call and is closed; a new engine can repeat the call."""


class RolloutEngine(Protocol):
    """Samples from the base or from the newest synced adapter, never from a mixture of both.

    `base` describes the copy of the base that is served, for the console and the model card.
    `adapter_dtype` is the precision that adapters are written in for `sync`; None, as for an engine
    without this attribute, is that of the trainer's parameters.
    """

    name: str
    base: str
    adapter_dtype: torch.dtype | None

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the adapter saved at `adapter` from now on; None serves the base."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: OnCompletion = noop
    ) -> list[list[Completion]]:
        """One list of completions per request, in the order of its seeds.

        `on_completion` receives the prompt, seed and completion of each sample, in any order.
        """

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] in nats of `token_ids` after the prompt, under the served weights."""

    def sleep(self) -> None:
        """Free the device memory until `wake`; calls in between raise RolloutError."""

    def wake(self) -> None:
        """Serve the same weights as before `sleep` again."""

    def close(self) -> None:
        """Free everything; may be called twice, and while asleep."""
