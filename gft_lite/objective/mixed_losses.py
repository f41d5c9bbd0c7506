"""Losses of methods that mix demonstrations with on-policy samples, or learn from a teacher.

Notation: p = pi(token), rho = p / p_old, sg = stop gradient, A = advantage, d = tokens of
demonstrations, s = tokens of self samples, H = sg(mean entropy of the row). Where a loss has parts,
the value of a part at tokens of other sources does not count: its weight is 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gft_lite.objective.losses import (
    LossInputs,
    LossOutput,
    clipped_loss,
    importance_ratio,
    present,
)
from gft_lite.types import SOURCES

if TYPE_CHECKING:
    from torch import Tensor

SELF = SOURCES.index("self")


def sft_rl_loss(
    inputs: LossInputs, *, sft_weight: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2
) -> LossOutput:
    """SFT and GRPO at once: parts `s: -min(rho A, clip(rho) A)` and `d: -c log p`.

    Source: the multitask baseline `grpo_split` of LUFFY (arXiv 2504.14945, ElliottYan/LUFFY).
    Reduction: the recipe's for GRPO, a token mean of its own for SFT. Differs: the authors' rates
    are for full fine-tuning.
    """
    rl = clipped_loss(inputs, clip_low=clip_low, clip_high=clip_high)
    return _parts(rl.per_token, -sft_weight * inputs.logprobs, metrics=rl.metrics)


def luffy_loss(inputs: LossInputs, *, gamma: float = 0.1) -> LossOutput:
    """LUFFY (arXiv 2504.14945): `d: -A f(p)`, `f(p) = p / (p + gamma)`; `s: -A rho`.

    Source: ElliottYan/LUFFY, `mix_core_alg.py`. Reduction: `constant`, the sum over tokens divided
    by rows and `rollout.max_tokens`, one for all sources. Metric: `shaping`, the factor
    gamma p / (p + gamma)^2 of the gradient on log p, at demonstrations. Differs: the entropy bonus
    (`objective.entropy`) is a token mean over all rows; LoRA rates.
    """
    probs, demonstration = inputs.logprobs.exp(), _demonstration(inputs)
    advantages = inputs.token_advantages
    shaped = probs / (probs + gamma)
    per_token = -advantages * shaped.where(demonstration, importance_ratio(inputs))
    factor = (gamma * probs / (probs + gamma).square()).detach()
    return LossOutput(per_token, {"shaping": factor.where(demonstration, math.nan)})


def srft_loss(
    inputs: LossInputs, *, gamma: float = 0.1, sft_weight: float = 0.5, rl_weight: float = 0.1
) -> LossOutput:
    """SRFT (arXiv 2506.19767), in two parts.

    SFT: `d: -0.5 exp(-H) log p`. RL: `d: -A f(p)` as LUFFY; `s: -0.1 exp(H) log p` where right,
    `+log p` where wrong. Source: TsinghuaC3I/Unify-Post-Training, `srft_type: paper`. Reduction:
    SFT a token mean, RL `constant` as LUFFY. Metric: `sft_factor`, 0.5 exp(-H), at demonstrations.
    Differs: H is taken at the start of the step.
    """
    logprobs, probs, demonstration = inputs.logprobs, inputs.logprobs.exp(), _demonstration(inputs)
    entropy = present(inputs.row_entropy, "row_entropy")
    right = present(inputs.correct, "correct") > 0.5
    factor = sft_weight * (-entropy).exp()
    own = (-rl_weight * entropy.exp() * logprobs).where(right, logprobs)
    rl = (-inputs.token_advantages * probs / (probs + gamma)).where(demonstration, own)
    metrics = {"sft_factor": factor.where(demonstration, math.nan)}
    return _parts(rl, -factor * logprobs, metrics=metrics)


def chord_loss(
    inputs: LossInputs,
    *,
    mu: float = 0.1,
    mu_end: float = 0.1,
    mu_warmup: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """CHORD (arXiv 2508.11408): `(1 - mu) GRPO(s) + mu [-sg(p (1 - p)) log p](d)`.

    mu rises from 0 over the share `mu_warmup` of the budget and falls by a cosine to `mu_end`.
    Source: modelscope/Trinity-RFT, `chord_policy_loss.py` (constant 0.1). Reduction: the recipe's
    for GRPO, a token mean of its own for demonstrations. Metric: `mu`.
    """
    if inputs.progress is None:
        raise ValueError("progress: must be among the method's needs, got none")
    weight = chord_mu(inputs.progress, mu, mu_end, mu_warmup)
    rl = clipped_loss(inputs, clip_low=clip_low, clip_high=clip_high)
    probs = inputs.logprobs.detach().exp()
    sft = -probs * (1 - probs) * inputs.logprobs
    metrics = {**rl.metrics, "mu": probs.new_full(probs.shape, weight)}
    return _parts((1 - weight) * rl.per_token, weight * sft, metrics=metrics)


def chord_mu(progress: float, peak: float, end: float, warmup: float) -> float:
    """The weight of demonstrations at a progress in [0, 1]."""
    if progress < warmup:
        return peak * progress / warmup
    done = min((progress - warmup) / (1 - warmup), 1.0) if warmup < 1 else 1.0
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


def hpt_loss(inputs: LossInputs, *, sft_weight: float = 1.0) -> LossOutput:
    """HPT (arXiv 2509.04419): `d: -c log p`, `s: -A rho`, one of both per problem.

    `select_by_gate` decides which. Source: TsinghuaC3I/Unify-Post-Training, `mix_trainer.py`.
    Reduction: the recipe's, over the rows that are left. Differs: LoRA rates; c is 0.3 in the
    authors' runs at 1.5B.
    """
    rl = -inputs.token_advantages * importance_ratio(inputs)
    return LossOutput((-sft_weight * inputs.logprobs).where(_demonstration(inputs), rl))


def rl_plus_loss(inputs: LossInputs, *, exponent: float = 0.5) -> LossOutput:
    """RL-PLUS (arXiv 2508.00222).

    `d: -A sg(1 - p)^0.5 2p / (p_old + 0.5 (p_old + 1))`; `s: -A rho`. Source: YihongDong/RL-PLUS,
    `rlplus_core_alg.py`. Reduction: the recipe's (token mean). Metric: `exploration`, sg(1 - p)^0.5
    at demonstrations. Differs: LoRA rates.
    """
    logprobs, demonstration = inputs.logprobs, _demonstration(inputs)
    probs = logprobs.exp()
    old = probs.detach() if inputs.old_logprobs is None else inputs.old_logprobs.exp()
    exploration = (1 - probs.detach()).clamp_min(0) ** exponent
    mixed = exploration * 2 * probs / (old + 0.5 * (old + 1))
    per_token = -inputs.token_advantages * mixed.where(demonstration, importance_ratio(inputs))
    return LossOutput(per_token, {"exploration": exploration.where(demonstration, math.nan)})


def prefix_rft_loss(
    inputs: LossInputs,
    *,
    prefix_share: float = 0.2,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> LossOutput:
    """Prefix-RFT (arXiv 2507.01679): dual-clip PPO on all tokens, of a demonstration's prefix only
    on the `prefix_share` of its tokens with the highest entropy.

    For A < 0 the loss is at most `-dual_clip A`. `cosine_prefix` decides the prefixes. Source:
    ZeroYuHuang/prefix_rft. Reduction: the recipe's (token mean), the prefix's tokens included.
    Metrics: those of `clipped_loss`. Differs: entropies are those at the start of the step.
    """
    clipped = clipped_loss(inputs, clip_low=clip_low, clip_high=clip_high)
    advantages = inputs.token_advantages
    bound = (-dual_clip * advantages).where(advantages < 0, math.inf)
    quantile = present(inputs.entropy_quantile, "entropy_quantile")
    trained = ~_demonstration(inputs) | (quantile >= 1 - prefix_share)
    return LossOutput(clipped.per_token.minimum(bound) * trained, clipped.metrics)


def uft_loss(
    inputs: LossInputs, *, hint_weight: float = 0.001, clip_low: float = 0.2, clip_high: float = 0.2
) -> LossOutput:
    """UFT (arXiv 2505.16984): GRPO on the continuation, and `-log p` on the hint before it.

    `binomial_hints` decides the hints. Source: liumy2010/UFT. Reduction: the recipe's for GRPO, a
    token mean of its own for the hint. Differs: a slice of the hint is a fifth of the
    demonstration's tokens.
    """
    rl = clipped_loss(inputs, clip_low=clip_low, clip_high=clip_high)
    return _parts(rl.per_token, -hint_weight * inputs.logprobs, metrics=rl.metrics)


def teacher_loss(inputs: LossInputs) -> LossOutput:
    """On-policy distillation: `s: -sg(log p_T - log p) log p`, with the teacher's log p_T.

    The sampled form of the gradient of KL(policy || teacher) on the policy's own samples (arXiv
    2306.13649; with a teacher that is the model itself, shown a demonstration, arXiv 2601.19897).
    Reduction: the recipe's (token mean). Metric: `teacher_kl`, log p - log p_T, in nats.
    """
    teacher = present(inputs.teacher_logprobs, "teacher_logprobs")
    difference = teacher - inputs.logprobs.detach()
    return LossOutput(-difference * inputs.logprobs, {"teacher_kl": -difference})


def _demonstration(inputs: LossInputs) -> Tensor:
    return present(inputs.source, "source") != SELF


def _parts(rl: Tensor, sft: Tensor, *, metrics: Mapping[str, Tensor]) -> LossOutput:
    import torch  # Here, so that importing the module costs nothing.

    return LossOutput(torch.stack([rl, sft]), metrics)
