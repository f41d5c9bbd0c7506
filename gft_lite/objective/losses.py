"""Group advantages, rectification, every per-token loss, and the ONE table `METHODS`.

Source of the equations: Group Fine-Tuning, arXiv 2604.14258. Everything is a pure function
written with tensor methods only: this module imports no torch, so that checking a recipe's
method or printing the table costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gft_lite.objective.rectification import rectify

if TYPE_CHECKING:
    from torch import Tensor


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's samples, never negative.

    Source: J. Schulman, "Approximating KL divergence", 2020; `exp(d) - d - 1`, d = ref - log p.

    Shapes: [...], [...] -> [...] in nats.
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


# --- per-token losses: (logprobs [..., T], advantages [...] or [..., T]) -> [..., T] ----------


def sft_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Negative log-likelihood, `-log p`; the advantages do not count."""
    return -logprobs


def dft_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Dynamic fine-tuning, `-sg(p) log p` (arXiv 2508.05629)."""
    return -logprobs.detach().exp() * logprobs


def asft_loss(
    logprobs: Tensor, advantages: Tensor, *, reference_kl: Tensor, lam: float = 0.1
) -> Tensor:
    """Anchored SFT, `-sg(p) log p + lam KL(ref || p)` (arXiv 2509.23753).

    `reference_kl` [..., T] is the KL over the whole vocabulary at each token, with gradient;
    direction and `lam` are those of the authors' code.
    """
    return dft_loss(logprobs, advantages) + lam * reference_kl


def gft_loss(logprobs: Tensor, advantages: Tensor, *, tau: float = 0.7) -> Tensor:
    """Group fine-tuning (Eq. 21), `-A C(p) log p`, p and log p of one untempered distribution."""
    return -_per_token(advantages, logprobs) * rectify(logprobs.exp(), tau) * logprobs


def gft_no_gal_loss(logprobs: Tensor, advantages: Tensor, *, tau: float = 0.7) -> Tensor:
    """GFT without group advantages, `-C(p) log p`."""
    return -rectify(logprobs.exp(), tau) * logprobs


def gft_no_dcr_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """GFT without rectification, `-A log p`."""
    return -_per_token(advantages, logprobs) * logprobs


def clipped_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """The clipped surrogate, `-min(rho A, clip(rho, 1 - low, 1 + high) A)` (arXiv 2402.03300,
    Eq. 3, whose KL penalty is the recipe's `objective.kl`).

    `old_logprobs` [..., T] are those at the rollout; None means that the policy has not moved
    since, so that rho = 1 and only its gradient counts.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = (logprobs - old).exp()
    advantages = _per_token(advantages, logprobs)
    return -(ratio * advantages).minimum(ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def psft_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Tensor:
    """Proximal SFT (arXiv 2508.17784): the clipped surrogate with every advantage 1."""
    ones = logprobs.detach().new_ones(())
    return clipped_loss(
        logprobs, ones, old_logprobs=old_logprobs, clip_low=clip_low, clip_high=clip_high
    )


def _per_token(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """Advantages that broadcast over tokens: one per row becomes [..., 1]."""
    if 0 < advantages.ndim < logprobs.ndim:
        advantages = advantages.unsqueeze(-1)
    return advantages
