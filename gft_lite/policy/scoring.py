"""The output head: log-probs, entropies and KLs of tokens without a full [T, V] tensor.

Axis suffixes: T response tokens of a micro-batch, V vocabulary, d hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gft_lite.policy.base import Divergence, TokenScores
from gft_lite.policy.tiled_head import tiled_head
from gft_lite.utils.memory import HEAD_TILE_TOKENS, HEAD_TILE_WORDS, LOGIT_CHUNK_BYTES

Loss = Callable[[TokenScores, slice], Tensor]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast that lets fp32 LoRA masters compute in the base's dtype."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


class OutputHead:
    """The model's output head, applied to a few tokens at a time.

    `fused` is True if `loss_gradient` supports the head: a linear layer without bias.
    """

    def __init__(self, head: Any, vocabulary: int, device: torch.device, dtype: torch.dtype):
        self.module = head
        self.fused = type(head) is nn.Linear and head.bias is None
        self._vocabulary = vocabulary
        self._device, self._dtype = device, dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits. Shapes: [..., d] -> [..., V]."""
        with autocast(self._device, self._dtype):
            return self.module(hidden).float()

    def scores(
        self, hidden: Tensor, targets: Tensor, ref_hidden: Tensor | None = None,
        *, entropy_gradient: bool = False,
    ) -> TokenScores:  # fmt: skip
        """Scores of the targets, with the KL to the reference if its states are given.

        Shapes: hidden and ref_hidden [T, d], targets [T].
        """
        inputs = [hidden, targets] if ref_hidden is None else [hidden, targets, ref_hidden]
        score = partial(self._score_chunk, entropy_gradient=entropy_gradient)
        return TokenScores(*self._over_chunks(score, *inputs))

    def divergence(self, hidden: Tensor, ref_hidden: Tensor, targets: Tensor) -> Divergence:
        """Policy against reference. Shapes: hidden and ref_hidden [T, d], targets [T]."""
        return Divergence(*self._over_chunks(self._compare_chunk, hidden, ref_hidden, targets))

    @torch.no_grad()
    def loss_gradient(
        self, hidden: Tensor, targets: Tensor, loss: Loss, *, entropy_gradient: bool = False
    ) -> tuple[float, Tensor, TokenScores]:
        """The loss, its gradient with respect to the hidden states [T, d], and the scores.

        With d log p_t / d logits = onehot(t) - softmax, the gradient of a token follows from the
        derivative of the loss in the token's own log-prob: two matrix products, no logits kept.
        That of the entropy H is d H / d logits = -softmax (log softmax + H).
        """
        if len(self.module.weight) > HEAD_TILE_WORDS and not entropy_gradient:
            return self._tiled_loss_gradient(hidden, targets, loss)
        value, gradient, scores = 0.0, torch.empty_like(hidden), []
        rows = self._chunk_rows
        for span in (slice(i, i + rows) for i in range(0, len(targets), rows)):
            logits = self.logits(hidden[span])
            normaliser = logits.logsumexp(-1)
            pick = targets[span, None]
            logprobs = logits.gather(-1, pick)[:, 0] - normaliser
            probs = (logits - normaliser[:, None]).exp_()
            entropy = normaliser - torch.linalg.vecdot(probs, logits)
            with torch.enable_grad():
                part = TokenScores(
                    logprobs.requires_grad_(), entropy.requires_grad_(entropy_gradient)
                )
                share = loss(part, span)
                inputs = [logprobs, entropy] if entropy_gradient else [logprobs]
                slope, *of_entropy = torch.autograd.grad(share, inputs)
            factor = -slope[:, None]
            for other in of_entropy:  # normaliser - entropy: log softmax + H = logits - that.
                shift = (normaliser - entropy)[:, None]
                factor = factor - other[:, None] * (logits - shift)
            by_logits = probs.mul_(factor).scatter_add_(-1, pick, slope[:, None])
            with autocast(self._device, self._dtype):
                gradient[span] = by_logits @ self.module.weight
            value += share.item()
            scores.append((logprobs.detach(), entropy.detach()))
            del logits, probs, by_logits  # Freed before those of the next slice are allocated.
        return value, gradient, TokenScores(*(torch.cat(c) for c in zip(*scores, strict=True)))

    def _tiled_loss_gradient(
        self, hidden: Tensor, targets: Tensor, loss: Loss
    ) -> tuple[float, Tensor, TokenScores]:
        """`loss_gradient` for a large vocabulary, with a tile of logits at a time."""
        value, gradient, scores = 0.0, torch.empty_like(hidden), []
        rows = HEAD_TILE_TOKENS[hidden.device.type]
        for span in (slice(i, i + rows) for i in range(0, len(targets), rows)):
            found = tiled_head(hidden[span], self.module.weight, targets[span], self._dtype)
            with torch.enable_grad():
                logprobs = found.logprobs.requires_grad_()
                share = loss(TokenScores(logprobs, found.entropy), span)
                [slope] = torch.autograd.grad(share, logprobs)
            gradient[span] = found.slope.mul_(slope[:, None])
            value += share.item()
            scores.append((logprobs.detach(), found.entropy))
        return value, gradient, TokenScores(*(torch.cat(c) for c in zip(*scores, strict=True)))

    @property
    def _chunk_rows(self) -> int:
        """The number of tokens whose logits are in memory at a time."""
        return max(1, LOGIT_CHUNK_BYTES // (4 * self._vocabulary))

    def _over_chunks(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """`function` over slices of tokens, recomputed in the backward pass."""
        parts = list(zip(*(x.split(self._chunk_rows) for x in inputs), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            outputs = [checkpoint(function, *part, use_reentrant=False) for part in parts]
        else:
            outputs = [function(*part) for part in parts]
        return tuple(torch.cat(column) for column in zip(*outputs, strict=True))

    def _score_chunk(
        self, hidden: Tensor, targets: Tensor, ref_hidden: Tensor | None = None,
        *, entropy_gradient: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Log-probs [T], entropies [T] and, with `ref_hidden`, KL(reference || policy) [T]."""
        logits = self.logits(hidden)
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser
        with contextlib.nullcontext() if entropy_gradient else torch.no_grad():
            logp = logits - normaliser[:, None]
            entropy = -(logp.exp() * logp).sum(-1)
        if ref_hidden is None:
            return logprobs, entropy
        with torch.no_grad():
            ref = self.logits(ref_hidden)
            # The policy's formula, so that equal logits have a KL of exactly 0.
            ref = ref - ref.logsumexp(-1, keepdim=True)
        kl = (ref.exp() * (ref - (logits - normaliser[:, None]))).sum(-1)
        return logprobs, entropy, kl

    def _compare_chunk(
        self, hidden: Tensor, ref_hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, ...]:
        """The fields of a Divergence, each [T]."""
        logp = self.logits(hidden).log_softmax(-1)
        ref = self.logits(ref_hidden).log_softmax(-1)
        forward = (ref.exp() * (ref - logp)).sum(-1)
        reverse = (logp.exp() * (logp - ref)).sum(-1)
        pick = targets[:, None]
        return logp.gather(-1, pick)[:, 0], ref.gather(-1, pick)[:, 0], forward, reverse
