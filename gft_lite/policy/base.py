"""The Policy protocol and the values that its methods return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn

    from gft_lite.policy.batching import Layout, MicroBatch, Row
    from gft_lite.recipe.sections import PolicySettings


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probs of the response tokens and the entropy of each distribution; all [T], nats.

    Gradient flows through the log-probs, and on request through the entropies and `reference_kl`,
    the exact KL(reference || policy) over the vocabulary.
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
    """The model that an engine loads: its folder or hub id, and a description of its origin."""

    location: str
    about: str


class Policy(Protocol):
    """The trained model as training loops and rollout engines use it."""

    model: Any  # A peft.PeftModel.
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
        """The frozen reference (the base, or the adapter at the start), without dropout."""

    def save_adapter(
        self, folder: Path, *, with_tokenizer: bool = False, dtype: torch.dtype | None = None
    ) -> Path:
        """Write the adapter as a plain PEFT adapter; the folder appears only when complete.

        `with_tokenizer` adds the tokenizer with its chat template, for an adapter to publish.
        `dtype` is that of the file, by default the parameters' own.
        """

    def load_adapter(self, folder: Path) -> None:
        """Read the weights that `save_adapter` wrote into the adapter, in place."""

    def batches(self, rows: Sequence[Row], token_budget: int) -> list[MicroBatch]:
        """Rows as micro-batches in the policy's layout."""

    def token_scores(
        self, batch: MicroBatch, *, reference_kl: bool = False, entropy_gradient: bool = False
    ) -> TokenScores:
        """Scores of the response tokens, with gradient if grad mode is on."""

    def backward(
        self,
        batch: MicroBatch,
        loss: Callable[[TokenScores, slice], Tensor],
        *,
        reference_kl: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[float, TokenScores]:
        """Add the gradient of a loss to the adapter's gradient; returns the loss and the scores.

        `loss(scores, span)` is called once for each slice `span` of the micro-batch's response
        tokens and returns the slice's part of the loss, a scalar. Gradient flows through
        `scores.logprobs` and, on request, `scores.entropy` and `scores.reference_kl`.
        A token's scores may affect only the part of its own slice.
        """

    def divergence(self, batch: MicroBatch) -> Divergence:
        """The exact KLs between policy and reference, from one forward pass of each."""

    def next_token_logits(self, input_ids: Tensor, cache: Any, **kwargs: Tensor) -> Tensor:
        """fp32 logits [B, V] of the token after `input_ids` [B, S], continuing `cache`."""

    def serving_base(self, kind: str, dtype: torch.dtype | None = None) -> ServedBase:
        """The model that an engine loads to serve this base; `kind` is `rollout.base`.

        `dtype` is the engine's precision, by default the policy's.
        """


@contextmanager
def evaluating(policy: Policy) -> Iterator[None]:
    """The policy's model in eval mode, without dropout, for the length of a `with`."""
    training = policy.model.training
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.train(training)


@contextmanager
def without_dropout(policy: Policy) -> Iterator[None]:
    """Set every dropout probability of base and adapter to 0 for the length of a `with`.

    Two passes over a micro-batch then give equal log-probs, as the ratio of a clipped loss to its
    old log-probs requires. Unlike in eval mode, transformers' layers keep recomputing activations.
    Forward and backward passes must both run inside.
    """
    owners = [policy.config, *policy.model.modules()]
    changed = [
        (owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, float) and _is_noise(owner, name)
    ]
    for owner, name, _ in changed:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _is_noise(owner: object, name: str) -> bool:
    """True for attributes such as GPT-2's `Dropout.p`, `attention_dropout` or `jitter_noise`."""
    dropout_module = name == "p" and "Dropout" in type(owner).__name__
    return dropout_module or "drop" in name or "jitter" in name
