"""Rollout engines: one protocol, ONE table."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gft_lite.dotted import load_dotted
from gft_lite.recipe_errors import RecipeError
from gft_lite.types import FinishReason

if TYPE_CHECKING:
    from gft_lite.policy import Policy
    from gft_lite.recipe import RolloutSettings


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """Where an engine's class is, and the package and extra that it needs beside ours."""

    path: str
    needs: str | None = None


# Importing this table imports no engine. "auto" is vllm where it and a GPU are, else transformers.
ENGINES: dict[str, EngineEntry | None] = {
    "auto": None,
    "transformers": EngineEntry("gft_lite.rollout.transformers:TransformersEngine"),
    "vllm": EngineEntry("gft_lite.rollout.vllm:VllmEngine", needs="vllm"),
    "vllm_server": EngineEntry("gft_lite.rollout.vllm_server:VllmServerEngine"),
    "unsloth": EngineEntry("gft_lite.rollout.unsloth:UnslothEngine", needs="unsloth"),
}


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


Seen = Callable[[tuple[int, ...], int, Completion], None]


def ignore(prompt_ids: tuple[int, ...], seed: int, completion: Completion) -> None:
    """For whom it is enough to have all completions at the end."""


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
        self, requests: Sequence[Request], sampling: Sampling, seen: Seen = ignore
    ) -> list[list[Completion]]:
        """One list of completions per request, in the order of its seeds.

        `seen` hears of each with its prompt and seed once it is there, in any order.
        """

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] in nats of `token_ids` after the prompt, under what is served."""

    def sleep(self) -> None:
        """Give the device's memory back until `wake`, and answer no request until then."""

    def wake(self) -> None:
        """Serve again what was served before."""

    def close(self) -> None:
        """Give everything back; may be called twice, and while asleep."""


def find_engine(name: str) -> EngineEntry:
    """The engine of that name, or the user's own at a dotted path.

    Raises: RecipeError if what it needs is not installed.
    """
    if name == "auto":
        import torch

        gpu = torch.cuda.is_available()
        name = "vllm" if gpu and importlib.util.find_spec("vllm") else "transformers"
    entry = ENGINES.get(name) or EngineEntry(name)
    if entry.needs and importlib.util.find_spec(entry.needs) is None:
        raise RecipeError(
            [f"rollout.engine: {entry.needs} is not installed. "
             f'pip install "gft-lite[{entry.needs}]", or set rollout.engine=transformers.']
        )  # fmt: skip
    return entry


def start_engine(settings: RolloutSettings, policy: Policy, scratch: Path) -> RolloutEngine:
    """Start the engine that the recipe names. `scratch` is a folder it may write to."""
    scratch.mkdir(parents=True, exist_ok=True)
    return load_dotted(find_engine(settings.engine).path)(settings, policy, scratch)
