"""Every per-token loss: `loss(inputs: LossInputs, *, parameters...) -> LossOutput`.

Source of the equations: Group Fine-Tuning, arXiv 2604.14258, unless a docstring names another.
Pure functions written with tensor methods only: no torch is imported here, so that checking a
recipe's method costs nothing. Tokens lie on the last axis, T; a micro-batch is one flat [T].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gft_lite.objective.rectification import rectify

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a per-token loss may read; optional inputs are there if the method `needs` them.

    Log-probs, entropy and KL are in nats, of the untempered distribution (temperature 1).

    Shapes: logprobs [..., T], with gradient; advantages [...] or [..., T]. Without gradient, all
    [..., T]: source, the index in `types.SOURCES`; old_logprobs, at the start of the step (None
    while the policy has not moved since); engine_logprobs, as sampled (the trainer's own for
    demonstrations); entropy; row_entropy, its mean over the row, and entropy_quantile, the share of
    the row's tokens of the same source with a lower or equal one, both at the start of the step;
    reference_logprobs; teacher_logprobs; correct, 1 where the response is right, else 0;
    success_share, the share of the group's self samples that are right. progress is the share of
    the budget that is spent, in [0, 1]. With gradient: reference_kl [..., T], the exact
    KL(reference || policy) over the vocabulary.
    """

    logprobs: Tensor
    advantages: Tensor
    source: Tensor | None = None
    old_logprobs: Tensor | None = None
    engine_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    row_entropy: Tensor | None = None
    entropy_quantile: Tensor | None = None
    reference_logprobs: Tensor | None = None
    reference_kl: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    correct: Tensor | None = None
    success_share: Tensor | None = None
    progress: float | None = None

    @property
    def token_advantages(self) -> Tensor:
        """Advantages that broadcast over tokens: one per row becomes [..., 1]."""
        if 0 < self.advantages.ndim < self.logprobs.ndim:
            return self.advantages.unsqueeze(-1)
        return self.advantages


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The loss of each token, and named figures to report.

    Each metric has a value per token, NaN where it does not apply; its mean over the other trained
    tokens of a step goes to `metrics.jsonl`, the console, the trackers and the report.

    Shapes: per_token [..., T], or [P, T] for a method with P `parts`; each metric [..., T].
    """

    per_token: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def sft_loss(inputs: LossInputs) -> LossOutput:
    """Negative log-likelihood, `-log p`; advantages are not used."""
    return LossOutput(-inputs.logprobs)


def dft_loss(inputs: LossInputs) -> LossOutput:
    """Dynamic fine-tuning, `-sg(p) log p` (arXiv 2508.05629)."""
    return LossOutput(-inputs.logprobs.detach().exp() * inputs.logprobs)


def asft_loss(inputs: LossInputs, *, lam: float = 0.1) -> LossOutput:
    """Anchored SFT, `-sg(p) log p + lam KL(ref || p)` (arXiv 2509.23753).

    Direction of the KL and `lam` are those of the authors' code. Needs `reference_kl`.
    """
    kl = present(inputs.reference_kl, "reference_kl")
    per_token = dft_loss(inputs).per_token + lam * kl
    return LossOutput(per_token, {"reference_kl": kl.detach()})


def gft_loss(inputs: LossInputs, *, tau: float = 0.7) -> LossOutput:
    """Group fine-tuning (Eq. 21), `-A C(p) log p`, p and log p of one untempered distribution.

    Metric: `rectified`, the share of tokens with p < tau.
    """
    probs = inputs.logprobs.exp()
    per_token = -inputs.token_advantages * rectify(probs, tau) * inputs.logprobs
    return LossOutput(per_token, {"rectified": probs.detach() < tau})


def gft_no_gal_loss(inputs: LossInputs, *, tau: float = 0.7) -> LossOutput:
    """GFT without group advantages, `-C(p) log p`. Metric: `rectified`, as `gft_loss`."""
    probs = inputs.logprobs.exp()
    return LossOutput(-rectify(probs, tau) * inputs.logprobs, {"rectified": probs.detach() < tau})


def gft_no_dcr_loss(inputs: LossInputs) -> LossOutput:
    """GFT without rectification, `-A log p`."""
    return LossOutput(-inputs.token_advantages * inputs.logprobs)


def clipped_loss(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> LossOutput:
    """The clipped surrogate, `-min(rho A, clip(rho, 1 - low, 1 + high) A)` (arXiv 2402.03300,
    Eq. 3, whose KL penalty is the recipe's `objective.kl`).

    Without `old_logprobs` the policy has not moved since the rollout: rho is 1 and only its
    gradient counts. Metrics: `ratio`, the mean of rho, and `clip_fraction`, the share of tokens
    whose gradient the clipping removes.
    """
    return clipped_surrogate(inputs, inputs.token_advantages, clip_low, clip_high)


def psft_loss(inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.28) -> LossOutput:
    """Proximal SFT (arXiv 2508.17784): the clipped surrogate with every advantage 1."""
    return clipped_surrogate(inputs, inputs.logprobs.detach().new_ones(()), clip_low, clip_high)


def importance_ratio(inputs: LossInputs) -> Tensor:
    """rho = p / p_old with gradient; without `old_logprobs` its value is 1. Shapes: [..., T]."""
    logprobs, old = inputs.logprobs, inputs.old_logprobs
    return (logprobs - (logprobs.detach() if old is None else old)).exp()


def clipped_surrogate(
    inputs: LossInputs, advantages: Tensor, clip_low: float, clip_high: float
) -> LossOutput:
    """The clipped surrogate with these advantages; metrics as `clipped_loss`."""
    ratio = importance_ratio(inputs)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    metrics = {"ratio": ratio.detach(), "clip_fraction": (clipped < unclipped).detach()}
    return LossOutput(-unclipped.minimum(clipped), metrics)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's samples, never negative.

    Source: J. Schulman, "Approximating KL divergence", 2020; `exp(d) - d - 1`, d = ref - log p.

    Shapes: [...], [...] -> [...] in nats.
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def present(value: Tensor | None, name: str) -> Tensor:
    """An optional input that the loss needs. Raises: ValueError if it is missing."""
    if value is None:
        raise ValueError(f"{name}: must be among the method's needs, got none")
    return value
