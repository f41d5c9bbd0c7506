"""Losses that mix demonstrations with self samples: hand-computed values, limits, selections."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import F64, close, f64, output, value
from torch import Tensor

from gft_lite.objective.advantages import advantages_of
from gft_lite.objective.losses import LossInputs, clipped_loss, sft_loss
from gft_lite.objective.mixed_losses import (
    chord_loss,
    chord_mu,
    hpt_loss,
    luffy_loss,
    prefix_rft_loss,
    relift_loss,
    rl_plus_loss,
    sft_rl_loss,
    srft_loss,
    teacher_loss,
    uft_loss,
)
from gft_lite.objective.reduction import token_weights
from gft_lite.objective.selection import (
    binomial_hints,
    cosine_prefix,
    select_by_gate,
    select_unsolved,
)
from gft_lite.types import Group, Problem, Response, ScoredGroup

EXPERT, TEACHER, SELF = 0, 1, 2
# A demonstration's tokens, then two self tokens.
PROBS = f64(0.25, 0.5, 0.8, 0.5)
LOGPROBS, LN2, LN45 = PROBS.log(), math.log(2), math.log(0.8)
SOURCE = torch.tensor([EXPERT, TEACHER, SELF, SELF])
ADVANTAGES = f64(1, 0.5, 2, -1)
# rho = 1/2, 1, 3/2, 1/2.
RATIO = f64(0.5, 1.0, 1.5, 0.5)
OLD = LOGPROBS - RATIO.log()
MIXED: dict[str, Any] = {"source": SOURCE, "old_logprobs": OLD}


# --- values ----------------------------------------------------------------------------------


def test_sft_rl_values():
    loss = value(sft_rl_loss, LOGPROBS, ADVANTAGES, old_logprobs=OLD, sft_weight=0.5)
    close(loss[1, :2], [LN2, LN2 / 2])
    # min(1.5, 1.2) * 2; max(0.5, 0.8) * 1.
    close(loss[0, 2:], [-2.4, 0.8])
    metrics = output(sft_rl_loss, LOGPROBS, ADVANTAGES, old_logprobs=OLD).metrics
    assert metrics["clip_fraction"].tolist() == [False, False, True, True]


def test_luffy_values():
    # f(1/4) = 1/4 / 0.35 = 5/7, f(1/2) = 1/2 / 0.6 = 5/6.
    loss = value(luffy_loss, LOGPROBS, ADVANTAGES, **MIXED)
    close(loss, [-5 / 7, -5 / 12, -3.0, 0.5])
    # No clipping: rho 1.5 and 0.5 stay. The factor: 0.1 p / (p + 0.1)^2.
    shaping = output(luffy_loss, LOGPROBS, ADVANTAGES, **MIXED).metrics["shaping"]
    close(shaping[:2], [0.025 / 0.35**2, 0.05 / 0.36])
    assert shaping[2:].isnan().all()
    close(value(luffy_loss, LOGPROBS, ADVANTAGES, **MIXED, gamma=0.5)[:2], [-1 / 3, -0.25])


def test_srft_values():
    entropy = f64(LN2, LN2, math.log(4), math.log(4))  # exp(-H) = 1/2, exp(H) = 4.
    given = {"source": SOURCE, "row_entropy": entropy}
    right = value(srft_loss, LOGPROBS, ADVANTAGES, correct=f64(1, 1, 1, 1), **given)
    wrong = value(srft_loss, LOGPROBS, ADVANTAGES, correct=f64(0, 0, 0, 0), **given)
    # SFT: 0.5 * 0.5 * -log p. RL of demonstrations as luffy; of self samples 0.1 * 4 * -log p.
    close(right[1, :2], [LN2 / 2, LN2 / 4])
    close(right[0], [-5 / 7, -5 / 12, -0.4 * LN45, 0.4 * LN2])
    # Where wrong, +log p: down to be minimised. Demonstrations don't ask.
    close(wrong[0], [-5 / 7, -5 / 12, LN45, -LN2])
    changed = value(srft_loss, LOGPROBS, ADVANTAGES, correct=f64(1, 1, 1, 1), **given,
                    sft_weight=1.0, rl_weight=0.5, gamma=0.25)  # fmt: skip
    close(changed[1, :2], [LN2, LN2 / 2])
    close(changed[0], [-0.5, -1 / 3, -2 * LN45, 2 * LN2])
    factor = output(srft_loss, LOGPROBS, ADVANTAGES, correct=f64(1, 1, 1, 1), **given)
    assert factor.metrics["sft_factor"][:2].tolist() == [0.25, 0.25]
    assert factor.metrics["sft_factor"][2:].isnan().all()


def test_chord_values():
    given = {"old_logprobs": OLD, "progress": 0.5}
    result = output(chord_loss, LOGPROBS, ADVANTAGES, **given, mu=0.25, mu_end=0.25)
    close(result.per_token[0, 2:], [0.75 * -2.4, 0.75 * 0.8])
    # mu p (1 - p) * -log p.
    close(result.per_token[1, :2], [0.25 * 3 / 16 * 2 * LN2, 0.25 * 0.25 * LN2])
    assert result.metrics["mu"].tolist() == [0.25] * 4
    assert result.metrics["ratio"].tolist() == pytest.approx(RATIO.tolist())
    plain = value(chord_loss, LOGPROBS, ADVANTAGES, **given, mu=0.25, mu_end=0.25, phi=False)
    close(plain[1, :2], [0.5 * LN2, 0.25 * LN2])


def test_chord_mu_rises_falls_and_stays():
    def mu(progress: float) -> float:
        return chord_mu(progress, 0.9, 0.1, 0.2, 0.4)

    assert [mu(0.0), mu(0.1), mu(0.2)] == [0.0, 0.45, 0.9]
    # Half way down after 0.2 of 0.4; the cosine's quarter is at (1 + cos 45 deg) / 2.
    assert mu(0.4) == pytest.approx(0.5)
    assert mu(0.3) == pytest.approx(0.1 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert [mu(0.6), mu(0.8), mu(1.0)] == pytest.approx([0.1] * 3)
    # By default the fall takes what is left of the budget.
    assert chord_mu(1.0, 0.9, 0.1, 0.2) == pytest.approx(0.1)
    assert chord_mu(0.6, 0.9, 0.1, 0.2) == pytest.approx(0.5)
    assert chord_mu(0.7, 0.1, 0.1, 0.0) == pytest.approx(0.1)
    assert chord_mu(0.5, 0.9, 0.1, 1.0) == 0.45
    assert chord_mu(1.0, 0.9, 0.1, 1.0) == 0.1
    assert chord_mu(0.2, 0.9, 0.1, 0.2, 0.0) == 0.1


@pytest.mark.parametrize("loss", [hpt_loss, relift_loss])
def test_hpt_and_relift_values(loss):
    found = value(loss, LOGPROBS, ADVANTAGES, old_logprobs=OLD, sft_weight=0.3)
    close(found[0, 2:], [-3.0, 0.5])  # rho A, not clipped.
    close(found[1, :2], [0.6 * LN2, 0.3 * LN2])


def test_rl_plus_values():
    # p = 1/4: p_old = 1/2, sqrt(3/4) 2/4 / (1.5/2 + 1/2); p = 1/2 = p_old: sqrt(1/2) / 1.25.
    first, second = math.sqrt(0.75) * 0.5 / 1.25, math.sqrt(0.5) / 1.25
    result = output(rl_plus_loss, LOGPROBS, ADVANTAGES, **MIXED)
    close(result.per_token, [-first, -0.5 * second, -3.0, 0.5])
    close(result.metrics["exploration"][:2], [math.sqrt(0.75), math.sqrt(0.5)])
    assert result.metrics["exploration"][2:].isnan().all()
    # On policy p_old = p: 2 p / (1.5 p + 0.5).
    close(value(rl_plus_loss, LOGPROBS, ADVANTAGES, source=SOURCE, exponent=0.0),
          [-0.5 / 0.875, -0.5 / 1.25, -2.0, 1.0])  # fmt: skip


def test_prefix_rft_values():
    quantile = f64(0.8, 0.81, 0.1, 0.1)
    loss = value(prefix_rft_loss, LOGPROBS, ADVANTAGES, **MIXED, entropy_quantile=quantile)
    # The prefix's first token is not among the top fifth; self tokens count at any entropy.
    close(loss, [0.0, -0.5, -2.4, 0.8])
    half = value(prefix_rft_loss, LOGPROBS, ADVANTAGES, **MIXED, entropy_quantile=quantile,
                 prefix_share=0.5)  # fmt: skip
    close(half[:2], [-0.5, -0.5])


def test_the_second_clip_bounds_the_loss_of_bad_samples():
    logprobs, ratio = f64(0.5, 0.5).log(), f64(1.4, 8.0)
    given = {"source": torch.tensor([SELF, SELF]), "entropy_quantile": f64(1, 1)}
    for advantages, expected in ((f64(-1, -1), [1.4, 3.0]), (f64(1, 1), [-1.2, -1.2])):
        leaf = logprobs.clone().requires_grad_()
        loss = value(prefix_rft_loss, leaf, advantages, old_logprobs=logprobs - ratio.log(),
                     **given)  # fmt: skip
        close(loss, expected)
        loss.sum().backward()
        assert ((leaf.grad == 0) == (f64(*expected) != 1.4)).all()


def test_uft_values():
    loss = value(uft_loss, LOGPROBS, ADVANTAGES, old_logprobs=OLD)
    close(loss[0, 2:], [-2.4, 0.8])
    close(loss[1, :1], [0.002 * LN2])
    close(value(uft_loss, LOGPROBS, ADVANTAGES, hint_weight=0.5)[1, :1], [LN2])


def test_teacher_values_and_gradient():
    leaf = LOGPROBS.clone().requires_grad_()
    result = output(teacher_loss, leaf, ADVANTAGES, teacher_logprobs=f64(0.5, 0.5, 0.4, 0.5).log())
    # log p - log p_T: -ln 2, 0, ln 2, 0.
    close(result.metrics["teacher_kl"], [-LN2, 0, LN2, 0])
    close(result.per_token, [-LN2 * -2 * LN2, 0, LN2 * LN45, 0])
    result.per_token.sum().backward()
    close(leaf.grad, [-LN2, 0, LN2, 0])


def test_the_teacher_losses_gradient_is_that_of_the_kl_on_average_over_samples():
    """E over samples of (log p - log p_T) d log p is the gradient of KL(policy || teacher)."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=F64, requires_grad=True)
    teacher = torch.randn(6, dtype=F64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    losses = value(teacher_loss, policy, f64(1), teacher_logprobs=teacher)
    (policy.exp().detach() * losses).sum().backward()
    sampled, logits.grad = logits.grad, None
    policy = logits.log_softmax(-1)
    (policy.exp() * (policy - teacher)).sum().backward()
    close(sampled, logits.grad)


@pytest.mark.parametrize(
    ("loss", "missing"),
    [(luffy_loss, "source"), (srft_loss, "source"), (chord_loss, "progress"),
     (rl_plus_loss, "source"), (prefix_rft_loss, "entropy_quantile"),
     (teacher_loss, "teacher_logprobs")],
)  # fmt: skip
def test_a_missing_input_is_named(loss, missing):
    with pytest.raises(ValueError, match=rf"^{missing}: must be among the method's needs"):
        loss(LossInputs(LOGPROBS, ADVANTAGES))


# --- limits ----------------------------------------------------------------------------------


def slope(loss: Any, probs: Tensor, source: int = EXPERT, **given: Any) -> Tensor:
    """The gradient on log p of demonstrations with advantage 1."""
    leaf = probs.log().requires_grad_()
    sources = torch.full(probs.shape, source)
    value(loss, leaf, torch.ones_like(probs), source=sources, **given).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_luffy_at_the_ends_of_p():
    # As p falls to 0 the weight 0.1 p / (p + 0.1)^2 is p / 0.1; at 1 it is 0.1 / 1.21; its
    # maximum, 1/4, is at p = gamma.
    tiny = f64(1e-9, 1e-12)
    close(slope(luffy_loss, tiny) / tiny, [-10.0, -10.0], 1e-6)
    close(slope(luffy_loss, f64(1.0)), [-0.1 / 1.21])
    grid = torch.linspace(1e-4, 1, 10_000, dtype=F64)
    weights = -slope(luffy_loss, grid)
    assert grid[weights.argmax()].item() == pytest.approx(0.1, abs=1e-3)
    assert weights.max().item() == pytest.approx(0.25, abs=1e-6)


def test_rl_plus_at_the_ends_of_p():
    # sqrt(1 - p) 2p / (1.5 p + 0.5): 4 p as p falls to 0, and 0 for what is already certain.
    tiny = f64(1e-9, 1e-12)
    close(slope(rl_plus_loss, tiny) / tiny, [-4.0, -4.0], 1e-6)
    close(slope(rl_plus_loss, f64(1.0)), [0.0])


@pytest.mark.parametrize("source", [EXPERT, TEACHER])
def test_demonstrations_alone(source):
    """With no self token in sight, luffy, rl_plus and srft's are what they are beside some."""
    for loss in (luffy_loss, rl_plus_loss):
        alone = value(loss, LOGPROBS[:1], f64(1), source=torch.tensor([source]))
        close(alone, value(loss, LOGPROBS, f64(1), source=SOURCE)[:1], 0)
    entropy, right = f64(LN2), f64(0)
    [rl], [sft] = value(srft_loss, LOGPROBS[:1], f64(1), source=torch.tensor([source]),
                        row_entropy=entropy, correct=right)  # fmt: skip
    close(rl, -5 / 7)
    close(sft, LN2 / 2)


def test_chord_with_mu_0_is_grpo_and_with_mu_1_weighted_sft():
    grpo = value(clipped_loss, LOGPROBS, ADVANTAGES, old_logprobs=OLD)
    none = value(chord_loss, LOGPROBS, ADVANTAGES, old_logprobs=OLD, progress=0.5, mu=0, mu_end=0)
    close(none[0], grpo, 0)
    close(none[1], [0.0] * 4, 0)
    whole = {"progress": 0.5, "mu": 1, "mu_end": 1, "old_logprobs": OLD}
    weighted = value(chord_loss, LOGPROBS, ADVANTAGES, **whole)
    close(weighted[0], [0.0] * 4, 0)
    close(weighted[1], PROBS * (1 - PROBS) * -LOGPROBS)
    plain = value(chord_loss, LOGPROBS, ADVANTAGES, **whole, phi=False)
    close(plain[1], value(sft_loss, LOGPROBS, ADVANTAGES), 0)


def test_on_policy_the_unclipped_part_has_grpos_gradient():
    for loss in (hpt_loss, relift_loss, sft_rl_loss):
        gradients = []
        for either in (loss, clipped_loss):
            leaf = LOGPROBS.clone().requires_grad_()
            found = value(either, leaf, ADVANTAGES)
            (found[0] if either is loss else found).sum().backward()
            gradients.append(leaf.grad)
        close(gradients[0], gradients[1], 0)
        close(gradients[0], -ADVANTAGES)


# --- reduction of parts, advantages against some sources -------------------------------------


def test_the_weights_of_a_part_leave_out_rows_without_tokens_in_it():
    assert token_weights([3, 0, 1]) == [0.25, 0.0, 0.25]
    assert token_weights([2, 0, 8], "sequence_mean") == [1 / 4, 0.0, 1 / 16]
    assert token_weights([3, 0, 1], "constant", max_tokens=10) == [0.05, 0.0, 0.05]
    for reduction in ("token_mean", "sequence_mean", "constant"):
        assert token_weights([0, 0], reduction) == [0.0, 0.0]


def test_advantages_against_the_self_samples():
    # Self 1, 0, 0, 0: mean 1/4, sample standard deviation 1/2, population sqrt(3) / 4.
    rewards, own = [1.0, 1.0, 0.0, 0.0, 0.0], [False, True, True, True, True]
    exact = pytest.approx([1.5, 1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages_of(rewards, eps=1e-9, baseline=own) == exact
    third = math.sqrt(3)
    assert advantages_of(rewards, std="population", eps=1e-9, baseline=own) == pytest.approx(
        [third, third, *[-1 / third] * 3], abs=1e-5
    )
    assert advantages_of(rewards, std="none", baseline=own) == [0.75, 0.75, -0.25, -0.25, -0.25]


def test_advantages_where_the_self_samples_are_flat_or_have_no_reward():
    own = [False, True, True]
    # Flat: nothing to learn from the samples; the demonstration is one above them.
    assert advantages_of([1.0, 0.0, 0.0], baseline=own) == [1.0, 0.0, 0.0]
    assert advantages_of([1.0, 1.0, 1.0], baseline=own) == [0.0, 0.0, 0.0]
    assert advantages_of([1.0, None, None], baseline=own) == [0.0, 0.0, 0.0]
    # One self sample with a reward of two: nothing to compare it with.
    assert advantages_of([1.0, 0.5, None], baseline=own) == [0.0, 0.0, 0.0]
    assert advantages_of([None, 1.0, 0.0], std="none", baseline=own) == [0.0, 0.5, -0.5]
    # A single self sample is a group of one, which its reward is compared with.
    assert advantages_of([1.0, 0.0], std="none", baseline=[False, True]) == [1.0, 0.0]


_rewards = st.lists(st.floats(-5, 5, width=16), min_size=2, max_size=8)


@given(_rewards, st.lists(st.floats(-5, 5, width=16), max_size=3),
       st.sampled_from(["sample", "population", "none"]))  # fmt: skip
@settings(deadline=None, derandomize=True)
def test_demonstrations_do_not_move_the_advantages_of_the_samples(own, others, std):
    alone = advantages_of(own, std=std, eps=1e-3)
    beside = advantages_of([*others, *own], std=std, eps=1e-3,
                           baseline=[False] * len(others) + [True] * len(own))  # fmt: skip
    assert beside[len(others):] == alone  # fmt: skip


# --- rows of a group -------------------------------------------------------------------------


def group(experts: int, right: list[bool | None], reward: float | None = None) -> ScoredGroup:
    """Demonstrations, then self samples, right, wrong or without a verdict."""
    responses = [Response((1,), "", "expert", correct=False) for _ in range(experts)]
    responses += [Response((1,), "", "self", correct=r, reward=reward) for r in right]
    return ScoredGroup(Group(Problem("p", "", "1"), tuple(responses)), (0.0,) * len(responses))


def test_the_gate_trains_the_demonstrations_or_the_samples():
    none, one, two = group(1, [False] * 3), group(1, [True, False, False]), group(2, [True, True])
    assert select_by_gate(none) == [True, False, False, False]
    assert select_by_gate(one) == [False, True, True, True]
    assert select_by_gate(one, gate=1) == [True, False, False, False]
    assert select_by_gate(two, gate=1) == [False, False, True, True]
    assert select_by_gate(two, gate=2) == [True, True, False, False]
    assert select_by_gate(group(0, [False, False])) == [True, True]


def test_unsolved_problems_add_their_demonstrations():
    assert select_unsolved(group(2, [False, False])) == [True] * 4
    assert select_unsolved(group(2, [False, True])) == [False, False, True, True]
    assert select_unsolved(group(0, [False])) == [True]


def test_without_a_verdict_a_reward_above_a_half_is_right():
    assert select_unsolved(group(1, [None], reward=0.6)) == [False, True]
    assert select_unsolved(group(1, [None], reward=0.5)) == [True, True]
    assert group(1, [True, False, None, None]).success_share == 0.25
    assert group(1, []).success_share == 0.0


# --- prefixes --------------------------------------------------------------------------------


def test_prefixes_of_prefix_rft_get_shorter():
    def shares(progress: float) -> list[float]:
        return [cosine_prefix(4, progress, Random(seed))[0] for seed in range(500)]

    for progress, bound in ((0.0, 0.95), (0.5, 0.5), (1.0, 0.05)):
        found = shares(progress)
        assert bound - 1e-9 <= min(found) <= max(found) <= 0.95
        assert sum(found) / 500 == pytest.approx((bound + 0.95) / 2, abs=0.03)
    assert cosine_prefix(4, 0.3, Random(0))[1:] == [0.0] * 3
    assert cosine_prefix(1, 0.3, Random(0), low=0.2, high=0.2) == [pytest.approx(0.2)]
    assert cosine_prefix(0, 0.3, Random(0)) == []


def test_hints_of_uft_are_slices_of_one_length_and_end():
    def counts(progress: float) -> list[float]:
        found = [binomial_hints(3, progress, Random(seed)) for seed in range(500)]
        assert all(len(set(shares)) == 1 and len(shares) == 3 for shares in found)
        return [shares[0] for shares in found]

    # The share revealed is q on average: 0.95 at the start, 0.5 half way, 0.05 at the end.
    for progress, q in ((0.0, 0.95), (0.3, 0.5), (0.5999, 0.05)):
        found = counts(progress)
        assert set(found) <= {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}
        assert sum(found) / 500 == pytest.approx(q, abs=0.03)
    assert counts(0.6) == counts(1.0) == [0.0] * 500
    assert binomial_hints(2, 0.9, Random(0), hint_share=1.0, low=1.0, high=1.0) == [1.0, 1.0]
    assert set(binomial_hints(2, 0.0, Random(0), slices=2)) <= {0.0, 0.5, 1.0}


@given(st.integers(0, 10), st.floats(0, 1), st.integers(0, 2**32), st.integers(1, 9))
@settings(deadline=None, derandomize=True)
def test_shares_are_shares_and_come_from_the_random_numbers_alone(count, progress, seed, slices):
    for function in (cosine_prefix, lambda *a: binomial_hints(*a, slices=slices)):
        shares = function(count, progress, Random(seed))
        assert len(shares) == count and all(0 <= share <= 1 for share in shares)
        assert shares == function(count, progress, Random(seed))
