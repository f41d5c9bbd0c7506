"""The policy: a frozen (quantised) base with a trainable adapter; one protocol."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gft_lite.recipe import PACKAGE, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn

    from gft_lite.batching import Layout, MicroBatch, Row
    from gft_lite.recipe import PolicySettings, RolloutSettings


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probs of the response tokens and the entropy of each distribution; [T], nats.

    `reference_kl`, on request, is the exact KL(reference || policy) over the vocabulary.
    """

    logprobs: Tensor
    entropy: Tensor
    reference_kl: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Divergence:
    """Policy against reference at the response tokens; all [T], nats.

    `forward` is the exact KL(reference || policy) over the vocabulary, `reverse` the exact
    KL(policy || reference).
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    forward: Tensor
    reverse: Tensor


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The model that an engine should load, a folder or a hub id, and in words which that is."""

    location: str
    about: str


class Policy(Protocol):
    """What the loops and the rollout engines know of a policy."""

    model: Any  # a peft.PeftModel
    tokenizer: Any
    settings: PolicySettings
    config: Any
    device: torch.device
    dtype: torch.dtype
    context: int
    eos_ids: frozenset[int]
    pad_id: int
    layout: Layout

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: the fp32 LoRA masters."""

    def base(self) -> AbstractContextManager[None]:
        """The base alone, for the length of a `with`."""

    def reference(self) -> AbstractContextManager[None]:
        """The frozen reference: the base, or the adapter that training started from."""

    def save_adapter(self, folder: Path) -> Path:
        """Write the adapter as a plain PEFT adapter; the folder appears only when complete."""

    def load_adapter(self, folder: Path) -> None:
        """Read the weights that `save_adapter` wrote into the adapter, in place."""

    def batches(self, rows: Sequence[Row], token_budget: int) -> list[MicroBatch]:
        """Rows as micro-batches in the policy's layout."""

    def token_scores(self, batch: MicroBatch, *, reference_kl: bool = False) -> TokenScores:
        """Log-probs and, on request, KL to the reference, with gradient when grad mode is on,
        and entropy of the response tokens."""

    def backward(
        self,
        batch: MicroBatch,
        loss: Callable[[TokenScores, slice], Tensor],
        *,
        reference_kl: bool = False,
    ) -> tuple[float, TokenScores]:
        """Add the gradient of a loss to the adapter's; returns the loss and the scores.

        `loss` is called for slices of the micro-batch's tokens: it takes their scores and the
        slice and returns what they add to the loss, a scalar; the log-prob of a token (and, on
        request, its KL to the reference) counts in that token's share alone.
        """

    def divergence(self, batch: MicroBatch) -> Divergence:
        """How far the policy is from the reference, exactly, by swapping the adapter."""

    def next_token_logits(self, input_ids: Tensor, cache: Any, **kwargs: Tensor) -> Tensor:
        """fp32 logits [B, V] of the token after `input_ids` [B, S], continuing `cache`."""

    def serving_base(self, kind: str) -> ServedBase:
        """What an engine should load to serve this policy's base; `kind` is `rollout.base`."""


@contextmanager
def evaluating(policy: Policy) -> Iterator[None]:
    """The policy's model in eval mode, without dropout, for the length of a `with`."""
    training = policy.model.training
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.train(training)


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """The module whose `load` makes the policy, and the package and extra that it needs, with a
    CUDA GPU, beside ours."""

    module: str
    needs: str | None = None


# Importing this table imports no back end.
BACKENDS: dict[str, BackendEntry] = {
    "transformers": BackendEntry("gft_lite.policy.qlora"),
    "unsloth": BackendEntry("gft_lite.policy.unsloth", needs="unsloth"),
}


def load_policy(
    settings: PolicySettings, seed: int = 0, rollout: RolloutSettings | None = None
) -> Policy:
    """Load the base that the recipe names and put a fresh, or the given, adapter on it.

    `rollout` is for a back end that can serve the base as well. Raises: RecipeError.
    """
    entry = BACKENDS[settings.backend]
    _refuse_missing(entry, settings, rollout)
    # bitsandbytes reports every cast of every forward, and at import a package we don't use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module(entry.module).load(settings, seed, rollout)


def _refuse_missing(
    entry: BackendEntry, settings: PolicySettings, rollout: RolloutSettings | None
) -> None:
    """What the back end needs and is not there, told before anything heavy is imported."""
    backend = settings.backend
    if entry.needs is None:
        if rollout and rollout.engine == "unsloth":
            rule = "must be another one than unsloth, which serves policy.backend unsloth alone"
            raise RecipeError([f"rollout.engine: {rule}, with policy.backend {backend}."])
        return
    import torch

    if settings.device == "cpu" or not torch.cuda.is_available():
        raise RecipeError(
            [f"policy.backend: must be transformers without a CUDA GPU, got {backend}, which needs "
             "one. Leave it out."]
        )  # fmt: skip
    if importlib.util.find_spec(entry.needs) is None:
        raise RecipeError(
            [f"policy.backend: {entry.needs} is not installed. "
             f'pip install "gft-lite[{entry.needs}]", or set policy.backend=transformers.']
        )  # fmt: skip


def model_location(model: str) -> str:
    """The folder or hub id behind a recipe's `policy.model`; `lab` is the packaged base."""
    return str(PACKAGE / "lab" / "base") if model == "lab" else model
