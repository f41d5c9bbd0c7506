"""Losses of methods that mix demonstrations with on-policy samples, or learn from a teacher.

Notation: p = pi(token), rho = p / p_old, sg = stop gradient, A = advantage, d = tokens of
demonstrations, s = tokens of self samples, H = sg(mean entropy of the row). Where a loss has parts,
the value of a part at tokens of other sources does not count: its weight is 0 there. What differs
everywhere: the authors train all weights, and their learning rates (1e-6, HPT 5e-6) do not suit an
adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

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
# Rules for a parameter's value, which the recipe checks.
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
AboveOne = Annotated[float, Field(gt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def sft_rl_loss(
    inputs: LossInputs,
    *,
    sft_weight: NonNegative = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """SFT and GRPO at once: parts `s: -min(rho A, clip(rho) A)` and `d: -c log p`.

    Source: the multitask baseline of LUFFY (arXiv 2504.14945, ElliottYan/LUFFY, `mix_actor.py`),
    whose advantages (`grpo_split`) compare self samples only. Reduction: the recipe's for GRPO, a
    token mean of its own for SFT. Differs: standard deviation and clipping are those of GRPO.

    Args:
        sft_weight: Weight c of SFT beside GRPO.
    """
    rl = clipped_loss(inputs, clip_low=clip_low, clip_high=clip_high)
    return _parts(rl.per_token, -sft_weight * inputs.logprobs, metrics=rl.metrics)


def luffy_loss(inputs: LossInputs, *, gamma: Positive = 0.1) -> LossOutput:
    """LUFFY (arXiv 2504.14945): `d: -A f(p)`, `f(p) = p / (p + gamma)`; `s: -A rho`.

    Source: ElliottYan/LUFFY, `mix_core_alg.py` (`p_div_p_0.1`) and `exp_scripts/train.sh`: one
    group mean over all sources, no standard deviation, no clipping, entropy bonus 0.001.
    Reduction: `constant`, the sum over tokens divided by `rollout.max_tokens`. Metric: `shaping`,
    the factor gamma p / (p + gamma)^2 of the gradient on log p, at demonstrations. Differs: divided
    by the rows too, where the authors add up micro-batches, so that their entropy bonus (a mean in
    each micro-batch) weighs less.

    Args:
        gamma: Probability at which f(p) = p / (p + gamma) is one half; a lower one gives unlikely
            tokens of demonstrations more weight.
    """
    probs, demonstration = inputs.logprobs.exp(), _demonstration(inputs)
    advantages = inputs.token_advantages
    shaped = probs / (probs + gamma)
    per_token = -advantages * shaped.where(demonstration, importance_ratio(inputs))
    factor = (gamma * probs / (probs + gamma).square()).detach()
    return LossOutput(per_token, {"shaping": factor.where(demonstration, math.nan)})


def srft_loss(
    inputs: LossInputs,
    *,
    gamma: Positive = 0.1,
    sft_weight: NonNegative = 0.5,
    rl_weight: NonNegative = 0.1,
) -> LossOutput:
    """SRFT (arXiv 2506.19767), in two parts.

    SFT: `d: -0.5 exp(-H) log p`. RL: `d: -A f(p)` as LUFFY; `s: -0.1 exp(H) log p` where right,
    `+log p` where wrong. Source: a reimplementation, TsinghuaC3I/Unify-Post-Training, `srft_type:
    paper` in `mix_actor.py` and `mix_core_alg.py`, and `exp_scripts/train_srft.sh`. Reduction: the
    recipe's (token mean) for RL, a token mean of its own for SFT. Metric: `sft_factor`,
    0.5 exp(-H), at demonstrations. Differs: H is taken at the start of the step, and RL is no sum
    over the rows of a micro-batch (see `hpt_loss`).

    Args:
        gamma: Probability at which f(p) = p / (p + gamma) is one half, as in LUFFY.
        sft_weight: Weight of SFT on demonstrations, times exp(-H), H the row's mean entropy.
        rl_weight: Weight of right self samples, times exp(H); wrong ones have 1.
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
    mu: Share = 0.1,
    mu_end: Share = 0.1,
    mu_warmup: Share = 0.0,
    mu_decay: Share = 1.0,
    phi: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """CHORD (arXiv 2508.11408): `(1 - mu) GRPO(s) + mu [-sg(phi(p)) log p](d)`, phi(p) = p (1 - p).

    `chord_mu` is the schedule. `phi: false` (CHORD-mu) leaves phi out; the authors then have mu 0.9
    and mu_end 0.05. Source: modelscope/Trinity-RFT, `chord_policy_loss.py`, and its
    `examples/mix_chord`: constant mu 0.1 with phi. Reduction: the recipe's (token mean) for GRPO, a
    token mean of its own for demonstrations. Metric: `mu`. Differs: demonstrations are those of the
    step's problems, where the authors draw them from a second data set, a fifth of the rows; GRPO
    without the bound of dual clipping.

    Args:
        mu: Weight of demonstrations after the warm-up; GRPO has 1 - mu.
        mu_end: Weight of demonstrations after the decay; equal to mu, it is constant.
        mu_warmup: Share of the budget in which the weight rises from 0 to mu.
        mu_decay: Share of the budget in which it then falls to mu_end, by a cosine.
        phi: Weight tokens of demonstrations by p (1 - p), so that certain and impossible ones
            count less.
    """
    if inputs.progress is None:
        raise ValueError("progress: must be among the method's needs, got none")
    weight = chord_mu(inputs.progress, mu, mu_end, mu_warmup, mu_decay)
    rl = clipped_loss(inputs, clip_low=clip_low, clip_high=clip_high)
    probs = inputs.logprobs.detach().exp()
    sft = -(probs * (1 - probs) if phi else 1.0) * inputs.logprobs
    metrics = {**rl.metrics, "mu": probs.new_full(probs.shape, weight)}
    return _parts((1 - weight) * rl.per_token, weight * sft, metrics=metrics)


def chord_mu(progress: float, peak: float, end: float, warmup: float, decay: float = 1.0) -> float:
    """The weight of demonstrations at a progress in [0, 1].

    It rises from 0 to `peak` over the share `warmup` of the budget, falls to `end` by a cosine over
    the share `decay`, at most what is left, and stays there.
    """
    if progress < warmup:
        return peak * progress / warmup
    length = min(decay, 1 - warmup)
    done = min((progress - warmup) / length, 1.0) if length else 1.0
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


def hpt_loss(inputs: LossInputs, *, sft_weight: NonNegative = 1.0) -> LossOutput:
    """HPT (arXiv 2509.04419): parts `s: -rho A` and `d: -c log p`, one of both per problem.

    `select_by_gate` decides which. Source: TsinghuaC3I/Unify-Post-Training, `mix_trainer.py`,
    `mix_actor.py` and `exp_scripts/train.sh`: eight self samples, one demonstration, no standard
    deviation, no clipping, entropy bonus 0.001. Reduction: the recipe's (token mean) for RL, a
    token mean of its own for SFT. Differs: the authors add up, over micro-batches of up to 32768
    tokens, a sum of RL over tokens divided by 8192 and a mean of SFT, so that RL weighs up to 4
    times as much there; c is 0.3 in their runs at 1.5B.

    Args:
        sft_weight: Weight c of SFT on problems that are trained by their demonstrations.
    """
    rl = -inputs.token_advantages * importance_ratio(inputs)
    return _parts(rl, -sft_weight * inputs.logprobs, metrics={})


def relift_loss(inputs: LossInputs, *, sft_weight: NonNegative = 1.0) -> LossOutput:
    """ReLIFT (arXiv 2506.07527): parts `s: -rho A` and `d: -c log p`, as `hpt_loss`.

    `select_unsolved` leaves the demonstrations of unsolved problems. Source: TheRoadQaQ/ReLIFT,
    `relift/core_algos.py`, `examples/math-1.5b/train.sh`: eight self samples, no standard
    deviation, no clipping, entropy bonus 0.001. Reduction: the recipe's (token mean) for RL, a
    token mean of its own for SFT. Differs: SFT is a part of the same step, where the authors
    collect 128 demonstrations for a step of its own with a second optimiser.

    Args:
        sft_weight: Weight c of SFT on the demonstrations of unsolved problems.
    """
    return hpt_loss(inputs, sft_weight=sft_weight)


def rl_plus_loss(inputs: LossInputs, *, exponent: NonNegative = 0.5) -> LossOutput:
    """RL-PLUS (arXiv 2508.00222).

    `d: -A sg(1 - p)^0.5 2p / (p_old + 0.5 (p_old + 1))`; `s: -A rho`. Source: YihongDong/RL-PLUS,
    `rlplus_core_alg.py` and `exp_scripts/train_RL-PLUS.sh`: one group mean over all sources, no
    standard deviation, no clipping, entropy bonus 0.001. Reduction: `constant`, as `luffy_loss`,
    and with its difference. Metric: `exploration`, sg(1 - p)^0.5 at demonstrations.

    Args:
        exponent: Power of 1 - p in the weight of a demonstration's tokens; a higher one moves the
            weight to unlikely tokens, with 0 none is moved.
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
    prefix_share: Share = 0.2,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: AboveOne = 3.0,
) -> LossOutput:
    """Prefix-RFT (arXiv 2507.01679): dual-clip PPO on all tokens, of a demonstration's prefix only
    on those with the highest entropy.

    `cosine_prefix` decides the prefixes. Source: ZeroYuHuang/prefix_rft, `core_algos.py`,
    `dp_actor.py` and `prefix_rft_trainer.yaml`: no standard deviation, entropy bonus 0.001.
    Reduction: the recipe's (token mean), the prefix's tokens included. Metrics: those of
    `clipped_loss`. Differs: entropies are compared within a row and at the start of the step, not
    within a micro-batch; the continuation has the advantage of its prefix, r - mean(self), where
    the authors give it r, the advantage of a group of one.

    Args:
        prefix_share: Share of a prefix's tokens that are trained, those with the highest entropy.
        dual_clip: Limit of the loss of a token with negative advantage A, in multiples of -A.
    """
    clipped = clipped_loss(inputs, clip_low=clip_low, clip_high=clip_high)
    advantages = inputs.token_advantages
    bound = (-dual_clip * advantages).where(advantages < 0, math.inf)
    quantile = present(inputs.entropy_quantile, "entropy_quantile")
    trained = ~_demonstration(inputs) | (quantile > 1 - prefix_share)
    return LossOutput(clipped.per_token.minimum(bound) * trained, clipped.metrics)


def uft_loss(
    inputs: LossInputs,
    *,
    hint_weight: NonNegative = 0.001,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """UFT (arXiv 2505.16984): GRPO on the continuation, and `-log p` on the hint before it.

    `binomial_hints` decides the hints. Source: liumy2010/UFT, `dp_actor.py`, `rl_dataset.py`,
    `run.py` and `ppo_trainer.yaml`: four self samples, KL 0.001 to the reference, entropy bonus
    0.001. Reduction: the recipe's (token mean) for GRPO, a token mean of its own for the hint.
    Differs: a slice of the hint is a fifth of the demonstration's tokens, not of its sentences;
    eight self samples.

    Args:
        hint_weight: Weight b of `-log p` (SFT) on the hint, beside GRPO on what follows it.
    """
    rl = clipped_loss(inputs, clip_low=clip_low, clip_high=clip_high)
    return _parts(rl.per_token, -hint_weight * inputs.logprobs, metrics=rl.metrics)


def teacher_loss(inputs: LossInputs) -> LossOutput:
    """On-policy distillation: `s: -sg(log p_T - log p) log p`, with the teacher's log p_T.

    The sampled form of the gradient of KL(policy || teacher) on the policy's own samples. Sources:
    arXiv 2306.13649; with a teacher that is the model itself, shown a demonstration (SDFT), arXiv
    2601.19897; TRL, `experimental/sdft/loss_utils.py`, mode `sampled_token`. Reduction: the
    recipe's (token mean); TRL's is `sequence_mean`. Metric: `teacher_kl`, log p - log p_T, in nats.
    Differs: TRL's default compares the 100 likeliest tokens by a Jensen-Shannon divergence.
    """
    teacher = present(inputs.teacher_logprobs, "teacher_logprobs")
    difference = teacher - inputs.logprobs.detach()
    return LossOutput(-difference * inputs.logprobs, {"teacher_kl": -difference})


def _demonstration(inputs: LossInputs) -> Tensor:
    return present(inputs.source, "source") != SELF


def _parts(rl: Tensor, sft: Tensor, *, metrics: Mapping[str, Tensor]) -> LossOutput:
    import torch  # Here, so that importing the module costs nothing.

    return LossOutput(torch.stack([rl, sft]), metrics)
