"""Rollouts with the trainer's own model: batched, with a KV cache, with the live adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.batching import Row
from gft_lite.recipe.sections import RolloutSettings
from gft_lite.rollout.base import Completion, OnCompletion, Request, RolloutError, Sampling, noop
from gft_lite.types import FinishReason


@dataclass(slots=True)
class _Sample:
    """A completion in progress.

    `noise` [limit] are its uniform random numbers; the first `searched` tokens were searched for
    stop strings.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    noise: Tensor
    limit: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    searched: int = 0
    stopped: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or len(self.token_ids) >= self.limit

    def completion(self) -> Completion:
        reason: FinishReason = "stop" if self.stopped else "length"
        return Completion(tuple(self.token_ids), tuple(self.logprobs), reason)


class TransformersEngine:
    """Serves the policy's own weights: no second copy, and nothing to load at a sync."""

    name = "transformers"
    base = "the trainer's own"
    adapter_dtype: torch.dtype | None = None

    def __init__(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> None:
        self._policy = policy
        self._rows = settings.rows
        self._serves_base = True

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the policy's live adapter, or the base for None."""
        self._serves_base = adapter is None

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: OnCompletion = noop
    ) -> list[list[Completion]]:
        """Sample each request once per seed.

        Raises: RolloutError for a prompt that fills the context, before anything is sampled.
        """
        samples = [
            [self._sample(request.prompt_ids, seed, sampling) for seed in request.seeds]
            for request in requests
        ]
        # Prompts of similar length share a batch, to save padding.
        flat = sorted((s for group in samples for s in group), key=lambda s: len(s.prompt_ids))
        with torch.no_grad(), self._served():
            for start in range(0, len(flat), self._rows):
                batch = flat[start : start + self._rows]
                self._decode(batch, sampling)
                for sample in batch:
                    on_completion(sample.prompt_ids, sample.seed, sample.completion())
        return [[sample.completion() for sample in group] for group in samples]

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] in nats of `token_ids` after the prompt, under the served weights."""
        [batch] = self._policy.batches([Row(tuple(prompt_ids), tuple(token_ids))], 1)
        with torch.no_grad(), self._served():
            return self._policy.token_scores(batch).logprobs.tolist()

    def sleep(self) -> None:
        """Do nothing: no memory is held between calls."""

    def wake(self) -> None:
        """Do nothing: `sleep` frees nothing."""

    def close(self) -> None:
        """Do nothing: no memory is held between calls."""

    @contextlib.contextmanager
    def _served(self) -> Iterator[None]:
        """The policy in eval mode, with or without its adapter."""
        base = self._policy.base() if self._serves_base else contextlib.nullcontext()
        with evaluating(self._policy), base:
            yield

    def _sample(self, prompt_ids: tuple[int, ...], seed: int, sampling: Sampling) -> _Sample:
        limit = min(sampling.max_tokens, self._policy.context - len(prompt_ids))
        if limit < 1 or not prompt_ids:
            raise RolloutError(
                f"prompt: must have 1 to {self._policy.context - 1} tokens, got {len(prompt_ids)}. "
                "Raise policy.context or shorten the prompt."
            )
        # A generator per sample makes a completion independent of the rest of its batch.
        generator = torch.Generator().manual_seed(seed)
        return _Sample(prompt_ids, seed, torch.rand(limit, generator=generator), limit)

    def _decode(self, samples: list[_Sample], sampling: Sampling) -> None:
        """Sample one token per forward for all samples; finished ones leave the batch."""
        policy, device = self._policy, self._policy.device
        width = max(len(s.prompt_ids) for s in samples)
        pads = torch.tensor([width - len(s.prompt_ids) for s in samples])
        ids = torch.tensor([[policy.pad_id] * (width - len(s.prompt_ids)) + [*s.prompt_ids]
                            for s in samples])  # fmt: skip
        mask = (torch.arange(width) >= pads[:, None]).long()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = DynamicCache(config=policy.config)
        while samples:
            logits = policy.next_token_logits(
                ids.to(device),
                cache,
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
            ).cpu()
            self._append(samples, logits, sampling)
            alive = [i for i, s in enumerate(samples) if not s.done]
            if len(alive) < len(samples):
                samples = [samples[i] for i in alive]
                keep = torch.tensor(alive, dtype=torch.long)
                mask, positions = mask[keep], positions[keep]
                if alive:
                    cache.batch_select_indices(keep.to(device))
            ids = torch.tensor([[s.token_ids[-1]] for s in samples])
            mask = torch.cat([mask, mask.new_ones(len(samples), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _append(self, samples: list[_Sample], logits: Tensor, sampling: Sampling) -> None:
        """Draw the next token of each sample, and set whether it ends the sample."""
        noise = torch.stack([s.noise[len(s.token_ids)] for s in samples])
        tokens = draw(logits, noise, sampling)
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        for sample, token, logprob in zip(samples, tokens.tolist(), logprobs.tolist(), strict=True):
            sample.token_ids.append(token)
            sample.logprobs.append(logprob)
            sample.stopped = token in self._policy.eos_ids or self._hits_stop(sample, sampling.stop)

    def _hits_stop(self, sample: _Sample, stop: Sequence[str]) -> bool:
        """Whether the text contains a stop string, in the tokens that were not searched before."""
        if not stop:
            return False
        # A stop string of n bytes is within the last n tokens before a new one; three more in case
        # that the first of them begins inside a character.
        first = max(0, sample.searched - max(len(s.encode()) for s in stop) - 3)
        text = self._policy.tokenizer.decode(
            sample.token_ids[first:], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if text.endswith("\ufffd"):
            return False  # The last character is incomplete: vLLM, too, waits for the rest.
        sample.searched = len(sample.token_ids)
        return any(s in text for s in stop)


def draw(logits: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """One token per row by inverting the cumulative distribution at `noise`.

    Shapes: logits [B, V], noise [B] in [0, 1) -> token ids [B].
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # Double precision: a product of noise < 1 and the total stays below the total.
    probs = (logits.double() / sampling.temperature).softmax(-1)
    order = None
    if sampling.top_k or sampling.top_p < 1:
        # Sorted only where a filter needs it: near-ties would swap with rounding noise.
        probs, order = probs.sort(descending=True, stable=True)
        probs[:, sampling.top_k or probs.shape[-1] :] = 0.0
        before = probs.cumsum(-1) - probs
        probs[before >= sampling.top_p * probs.sum(-1, keepdim=True)] = 0.0
    cumulative = probs.cumsum(-1)
    place = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return (place if order is None else order.gather(-1, place)).squeeze(-1)
