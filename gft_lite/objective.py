"""Group advantages, rectification, every per-token loss, and the ONE table `METHODS`.

Source of the equations: Group Fine-Tuning, arXiv 2604.14258. Everything is a pure function
written with tensor methods only: this module imports no torch, so that checking a recipe's
method or printing the table costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gft_lite.dotted import load_dotted
from gft_lite.types import Source

if TYPE_CHECKING:
    from torch import Tensor

Std = Literal["sample", "population", "none"]
Reduction = Literal["token_mean", "sequence_mean", "constant"]
Need = Literal["old_logprobs", "reference_kl"]


def group_advantages(
    rewards: Tensor | Sequence[float], *, std: Std = "sample", eps: float = 1e-6
) -> Tensor:
    """Rewards normalised within their group (Eq. 4): `(R_k - mean) / (std + eps)`.

    The whole group counts, whatever the sources. `std="none"` only centres (Dr. GRPO).
    A flat group gives exact zeros; a group of one gives its reward (mean 0, std 1), as the
    authors' code does.

    Shapes: rewards [..., K] -> advantages [..., K].
    Raises: ValueError for an empty group, a NaN or infinite reward, or an unknown std.
    """
    import torch  # A list of rewards is welcome, so a tensor may have to be made.

    if std not in ("sample", "population", "none"):
        raise ValueError(f"std: must be sample, population or none, got {std!r}")
    exact = isinstance(rewards, torch.Tensor) and rewards.is_floating_point()
    values = torch.as_tensor(rewards, dtype=None if exact else torch.get_default_dtype())
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError("rewards: must hold at least one reward of a group, got none")
    if not bool(values.isfinite().all()):
        raise ValueError(f"rewards: must be finite, got {values.tolist()}")
    if values.shape[-1] == 1:
        return values.clone()
    centred = values - values.mean(-1, keepdim=True)
    if std != "none":
        spread = values.std(-1, keepdim=True, correction=1 if std == "sample" else 0)
        centred = centred / (spread + eps)
    # Rounding of the mean would leave a flat group a tiny reward difference to learn from.
    flat = values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)
    return centred.masked_fill(flat, 0.0)


def rectify(probs: Tensor, tau: float) -> Tensor:
    """Dynamic coefficient rectification (Eq. 5): `C(p) = sg(p) if p < tau else 1`.

    Shapes: probs [...] in [0, 1] -> coefficients [...], without gradient.
    """
    probs = probs.detach()
    return probs.masked_fill(probs >= tau, 1.0)


def token_weights(
    lengths: Sequence[int], reduction: Reduction = "token_mean", max_tokens: int = 1
) -> list[float]:
    """The weight of each token of each row, so that the step's loss is one weighted sum.

    There is one denominator per optimiser step: however its rows are cut into micro-batches,
    summing `weight * per-token loss` gives the same gradient. `token_mean` divides by all
    response tokens, `sequence_mean` by the row's length and the rows, `constant` (Dr. GRPO)
    by the rows and `max_tokens`.

    Shapes: lengths [B] in tokens -> weights [B].
    Raises: ValueError for an unknown reduction.
    """
    rows, tokens = len(lengths), sum(lengths)
    if reduction == "token_mean":
        return [1.0 / max(tokens, 1)] * rows
    if reduction == "sequence_mean":
        return [1.0 / (rows * max(length, 1)) for length in lengths]
    if reduction == "constant":
        return [1.0 / (rows * max_tokens) for _ in lengths]
    raise ValueError(f"reduction: must be token_mean, sequence_mean or constant, got {reduction!r}")


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


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What a training method is: its loss, the rows it trains on, its defaults, its source.

    `loss` takes log-probs, advantages, the `parameters` named here, all of them fields of the
    recipe's `objective:`, and what it `needs`: `old_logprobs`, those at the rollout (None where
    a single update follows it), `reference_kl`, the exact KL(reference || policy) of each token
    with gradient. `scales_with_advantage` says that loss and gradient are 0 where the advantage
    is, so that such rows need not go through the model. `defaults` is a recipe fragment that
    lies under the user's recipe.
    """

    loss: Callable[..., Tensor]
    sources: tuple[Source, ...]
    source: str
    formula: str = ""
    parameters: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    group_advantages: bool = True
    scales_with_advantage: bool = False
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _defaults(
    expert: int, teacher: int, self_: int, lr: float, **objective: Any
) -> dict[str, dict[str, Any]]:
    """A method's recipe fragment: its group, its loss settings, a QLoRA learning rate."""
    group: dict[str, Any] = {"expert": expert, "teacher": teacher, "self": self_}
    if self_ == 0:
        group["shortfall"] = "drop"
    return {"group": group, "objective": objective, "optim": {"lr": lr}}


_DEMONSTRATIONS: tuple[Source, ...] = ("expert", "teacher")
_MIXED: tuple[Source, ...] = ("expert", "teacher", "self")
_LIKELIHOOD = "maximum likelihood"
_SURROGATE: dict[str, Any] = {
    "formula": "-min(rho A, clip(rho) A)",
    "parameters": ("clip_low", "clip_high"),
    "needs": ("old_logprobs",),
    "scales_with_advantage": True,
}

METHODS: dict[str, Method] = {
    "sft": Method(
        sft_loss, ("expert",), _LIKELIHOOD, "-log p",
        group_advantages=False, defaults=_defaults(1, 0, 0, 1e-4),
    ),
    "sft_mix": Method(
        sft_loss, _DEMONSTRATIONS, _LIKELIHOOD, "-log p",
        group_advantages=False, defaults=_defaults(1, 3, 0, 1e-4),
    ),
    "distillation": Method(
        sft_loss, ("teacher",), _LIKELIHOOD, "-log p",
        group_advantages=False, defaults=_defaults(0, 3, 0, 1e-4),
    ),
    "dft": Method(
        dft_loss, _DEMONSTRATIONS, "arXiv 2508.05629", "-sg(p) log p",
        group_advantages=False, defaults=_defaults(1, 0, 0, 1e-4),
    ),
    "asft": Method(
        asft_loss, _DEMONSTRATIONS, "arXiv 2509.23753", "-sg(p) log p + lam KL",
        parameters=("lam",), needs=("reference_kl",),
        group_advantages=False, defaults=_defaults(1, 0, 0, 1e-4, lam=0.1),
    ),
    "psft": Method(
        psft_loss, _DEMONSTRATIONS, "arXiv 2508.17784", "-min(rho, clip(rho))",
        parameters=("clip_low", "clip_high"), needs=("old_logprobs",),
        # Eight as in the authors' script; with one, rho is 1 and the gradient that of SFT.
        group_advantages=False, defaults=_defaults(1, 0, 0, 1e-4, clip_high=0.28)
        | {"train": {"updates_per_rollout": 8}},
    ),
    "grpo": Method(
        clipped_loss, ("self",), "arXiv 2402.03300, Eq. 3", **_SURROGATE,
        defaults=_defaults(0, 0, 8, 2e-5, reduction="sequence_mean", eps=1e-4),
    ),
    "dr_grpo": Method(
        clipped_loss, ("self",), "arXiv 2503.20783", **_SURROGATE,
        defaults=_defaults(0, 0, 8, 2e-5, reduction="constant", std="none"),
    ),
    "dapo": Method(
        clipped_loss, ("self",), "arXiv 2503.14476, Eq. 8", **_SURROGATE,
        defaults=_defaults(0, 0, 8, 2e-5, clip_high=0.28, eps=1e-4, mask_truncated=True),
    ),
    "gft": Method(
        gft_loss, _MIXED, "arXiv 2604.14258, Eq. 21", "-A C(p) log p",
        parameters=("tau",), scales_with_advantage=True, defaults=_defaults(1, 3, 4, 2e-5),
    ),
    "gft_no_gal": Method(
        gft_no_gal_loss, _DEMONSTRATIONS, "arXiv 2604.14258, ablation", "-C(p) log p",
        parameters=("tau",), group_advantages=False, defaults=_defaults(1, 3, 0, 2e-5),
    ),
    "gft_no_dcr": Method(
        gft_no_dcr_loss, _MIXED, "arXiv 2604.14258, ablation", "-A log p",
        scales_with_advantage=True, defaults=_defaults(1, 3, 4, 2e-5),
    ),
    "gft_no_mix": Method(
        gft_loss, ("expert", "self"), "arXiv 2604.14258, ablation", "-A C(p) log p",
        parameters=("tau",), scales_with_advantage=True, defaults=_defaults(1, 0, 7, 2e-5),
    ),
}  # fmt: skip


def find_method(name: str) -> Method:
    """The method of that name, or the user's own `Method` at a dotted path.

    Raises: ValueError that says what is missing.
    """
    method = METHODS[name] if name in METHODS else load_dotted(name)
    if not isinstance(method, Method):
        raise ValueError(f"must be a gft_lite.objective.Method, got a {type(method).__name__}")
    return method
