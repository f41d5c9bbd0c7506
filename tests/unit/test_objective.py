"""The objective against hand-computed values and closed-form gradients."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import F64, close, f64, output, scored, value
from torch import Tensor

from gft_lite.objective.advantages import advantages_of, group_advantages
from gft_lite.objective.losses import (
    asft_loss,
    clipped_loss,
    dft_loss,
    gft_loss,
    gft_no_dcr_loss,
    gft_no_gal_loss,
    k3,
    psft_loss,
    sft_loss,
)
from gft_lite.objective.rectification import rectify
from gft_lite.objective.reduction import token_weights


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- advantages ------------------------------------------------------------------------------


def test_sample_advantages():
    # Mean 0.25; sample variance (0.75^2 + 3 * 0.25^2) / 3 = 0.25, so std 0.5.
    close(group_advantages(f64(1, 0, 0, 0), eps=0.0), [1.5, -0.5, -0.5, -0.5])
    close(group_advantages(f64(1, 0, 0, 0), eps=0.5), [0.75, -0.25, -0.25, -0.25])
    close(group_advantages(f64(1, 0, 0, 0)), [1.5 / 1.000002] + [-0.5 / 1.000002] * 3)


def test_population_advantages():
    # Population variance 0.75 / 4, so std sqrt(3) / 4.
    expected = [3 / math.sqrt(3)] + [-1 / math.sqrt(3)] * 3
    close(group_advantages(f64(1, 0, 0, 0), std="population", eps=0.0), expected)


def test_centred_advantages():
    close(group_advantages(f64(1, 0, 0, 0), std="none"), [0.75, -0.25, -0.25, -0.25])
    close(group_advantages(f64(3, -1), std="none", eps=7.0), [2.0, -2.0])


@pytest.mark.parametrize("std", ["sample", "population", "none"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.3])
def test_a_flat_group_has_exact_zeros_and_a_group_of_one_its_reward(std: Any, reward: float):
    # The mean of seven times 0.1 is not 0.1 in floating point.
    assert group_advantages([reward] * 7, std=std, eps=1e-12).tolist() == [0.0] * 7
    close(group_advantages(f64(reward), std=std), [reward])


def test_groups_are_rows():
    rewards = f64([1, 0, 0, 0], [1, 1, 1, 1])
    close(group_advantages(rewards, eps=0.0), [[1.5, -0.5, -0.5, -0.5], [0, 0, 0, 0]])


def test_rewards_may_be_a_list_or_integers_and_keep_their_precision():
    assert group_advantages([1, 0]).dtype == torch.float32
    assert group_advantages(torch.tensor([1, 0])).dtype == torch.float32
    assert group_advantages(torch.tensor([True, False])).dtype == torch.float32
    rewards = f64(1 / 3, 0.0, 1e-9)
    result = group_advantages(rewards, std="none")
    assert result.dtype == F64
    close(result[2] - result[1], 1e-9, 1e-16)


@pytest.mark.parametrize(
    ("rewards", "text"),
    [
        ([], r"^rewards: must hold at least one reward of a group, got none"),
        (torch.zeros(2, 0), r"^rewards: must hold at least one"),
        (torch.tensor(1.0), r"^rewards: must hold at least one"),
        ([1.0, float("nan")], r"^rewards: must be finite, got \[1.0, nan\]"),
        ([float("inf")], r"^rewards: must be finite, got \[inf\]"),
    ],
)
def test_rewards_that_are_none(rewards: Any, text: str):
    with pytest.raises(ValueError, match=text):
        group_advantages(rewards)


def test_an_unknown_std():
    with pytest.raises(ValueError, match=r"^std: must be sample, population or none, got 'x'"):
        group_advantages([1.0], std="x")  # type: ignore[arg-type]


_rewards = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=9)


@given(_rewards, st.sampled_from(["sample", "population", "none"]), st.randoms())
@settings(deadline=None, derandomize=True)
def test_advantages_sum_to_zero_keep_the_order_and_follow_a_permutation(rewards, std, random):
    values = f64(*rewards)
    before = values.clone()
    advantages = group_advantages(values, std=std)
    assert torch.equal(values, before)
    assert abs(advantages.sum().item()) < 1e-6
    assert (advantages[values.argsort()].diff() >= 0).all()
    order = list(range(len(rewards)))
    random.shuffle(order)
    close(group_advantages(values[order], std=std), advantages[order], 1e-9)


@given(_rewards, st.floats(0.1, 10), st.floats(-5, 5))
@settings(deadline=None, derandomize=True)
def test_sample_advantages_have_unit_spread_and_forget_scale_and_shift(rewards, scale, shift):
    values = f64(*rewards)
    if values.std() < 1e-3:
        return
    advantages = group_advantages(values, eps=1e-12)
    close(advantages.std(), 1.0, 1e-6)
    close(group_advantages(scale * values + shift, eps=1e-12), advantages, 1e-6)


# --- rectification ---------------------------------------------------------------------------


def test_rectify():
    probs = f64(0.0, 0.3, 0.6999, 0.7, 0.9, 1.0)
    assert rectify(probs, 0.7).tolist() == [0.0, 0.3, 0.6999, 1.0, 1.0, 1.0]
    assert rectify(probs, 0.0).tolist() == [1.0] * 6
    assert rectify(probs, 1.1).tolist() == probs.tolist()
    assert probs.tolist() == [0.0, 0.3, 0.6999, 0.7, 0.9, 1.0]


def test_rectify_stops_the_gradient():
    assert not rectify(f64(0.3, 0.9).requires_grad_(), 0.7).requires_grad


# --- token weights ---------------------------------------------------------------------------


def test_token_weights():
    assert token_weights([3, 1]) == [0.25, 0.25]
    assert token_weights([2, 8, 1], "sequence_mean") == [1 / 6, 1 / 24, 1 / 3]
    assert token_weights([3, 1], "constant", max_tokens=10) == [0.05, 0.05]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_token_weights_of_nothing(reduction: Any):
    assert token_weights([], reduction) == []
    assert all(math.isfinite(weight) for weight in token_weights([0, 0], reduction))


def test_an_unknown_reduction():
    for lengths in ([], [1]):
        with pytest.raises(ValueError, match=r"^reduction: must be token_mean, .*, got 'mean'"):
            token_weights(lengths, "mean")  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8))
@settings(deadline=None, derandomize=True)
def test_token_weights_are_the_means_that_they_are_named_after(lengths: list[int]):
    rows = [torch.rand(length, dtype=F64) for length in lengths]

    def weighted(reduction: Any) -> Tensor:
        weights = token_weights(lengths, reduction, max_tokens=64)
        return sum((w * row.sum() for w, row in zip(weights, rows, strict=True)), f64(0)[0])

    close(weighted("token_mean"), torch.cat(rows).mean())
    close(weighted("sequence_mean"), torch.stack([row.mean() for row in rows]).mean())
    close(weighted("constant"), torch.cat(rows).sum() / (len(rows) * 64))


# --- k3 --------------------------------------------------------------------------------------


def test_k3():
    # ref / policy = 1/2, 1, 4: 1/2 + ln 2 - 1, 0, 4 - ln 4 - 1.
    close(
        k3(f64(0.5, 0.5, 0.2).log(), f64(0.25, 0.5, 0.8).log()),
        [math.log(2) - 0.5, 0.0, 3 - math.log(4)],
    )


def test_k3_is_never_negative_and_its_mean_under_the_policy_is_the_kl():
    policy, reference = torch.randn(2, 5, 11, dtype=F64).log_softmax(-1)
    estimate = k3(policy, reference)
    assert (estimate >= 0).all()
    kl = (policy.exp() * (policy - reference)).sum(-1)
    close((policy.exp() * estimate).sum(-1), kl)


# --- responses without a reward ---------------------------------------------------------------


def test_a_response_without_a_reward_has_advantage_0_and_is_not_compared_with():
    # Mean 0.5, sample standard deviation sqrt(0.5).
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert advantages_of([1.0, None, 0.0]) == pytest.approx([expected, 0.0, -expected], abs=1e-7)
    assert advantages_of([None, None]) == [0.0, 0.0]
    assert advantages_of([None, 1.0]) == [0.0, 0.0]
    assert advantages_of([2.5]) == [2.5]  # A group of one, as group_advantages.
    assert advantages_of([1.0, None, 3.0], std="none") == [-1.0, 0.0, 1.0]


# --- losses: values --------------------------------------------------------------------------

PROBS = f64([0.25, 0.5, 0.8], [0.5, 0.9, 0.125])
LOGPROBS = PROBS.log()
ADVANTAGES = f64(2, -1)
LN2, LN45, LN49 = math.log(2), math.log(0.8), math.log(0.9)


def test_loss_values():
    close(value(sft_loss, LOGPROBS, ADVANTAGES), [[2 * LN2, LN2, -LN45], [LN2, -LN49, 3 * LN2]])
    close(
        value(dft_loss, LOGPROBS, ADVANTAGES),
        [[0.5 * LN2, 0.5 * LN2, -0.8 * LN45], [0.5 * LN2, -0.9 * LN49, 0.375 * LN2]],
    )
    close(
        value(gft_loss, LOGPROBS, ADVANTAGES, tau=0.7),
        [[LN2, LN2, -2 * LN45], [-0.5 * LN2, LN49, -0.375 * LN2]],
    )
    close(
        value(gft_loss, LOGPROBS, ADVANTAGES, tau=0.3),
        [[LN2, 2 * LN2, -2 * LN45], [-LN2, LN49, -0.375 * LN2]],
    )
    close(
        value(gft_no_gal_loss, LOGPROBS, ADVANTAGES, tau=0.7),
        [[0.5 * LN2, 0.5 * LN2, -LN45], [0.5 * LN2, -LN49, 0.375 * LN2]],
    )
    close(
        value(gft_no_dcr_loss, LOGPROBS, ADVANTAGES),
        [[4 * LN2, 2 * LN2, -2 * LN45], [-LN2, LN49, -3 * LN2]],
    )


def test_asft_loss_values():
    kl = f64([0.0, 0.2, 1.0], [2.0, 0.5, 0.1])
    close(
        value(asft_loss, LOGPROBS, ADVANTAGES, reference_kl=kl),
        [[0.5 * LN2, 0.5 * LN2 + 0.02, -0.8 * LN45 + 0.1],
         [0.5 * LN2 + 0.2, -0.9 * LN49 + 0.05, 0.375 * LN2 + 0.01]],
    )  # fmt: skip
    close(
        value(asft_loss, LOGPROBS, ADVANTAGES, reference_kl=kl, lam=2.0)[1],
        [0.5 * LN2 + 4.0, -0.9 * LN49 + 1.0, 0.375 * LN2 + 0.2],
    )


def test_clipped_loss_values():
    # rho = 1/2, 1, 3/2 in both rows; A = 2, then -1; clipped to [0.8, 1.3].
    old = (PROBS / f64(0.5, 1.0, 1.5)).log()
    loss = value(clipped_loss, LOGPROBS, ADVANTAGES, old_logprobs=old, clip_low=0.2, clip_high=0.3)
    close(loss, [[-1.0, -2.0, -2.6], [0.8, 1.0, 1.5]])
    close(value(psft_loss, LOGPROBS, ADVANTAGES, old_logprobs=old), [[-0.5, -1.0, -1.28]] * 2)
    close(
        value(psft_loss, LOGPROBS, ADVANTAGES, old_logprobs=old, clip_high=0.1),
        [[-0.5, -1, -1.1]] * 2,
    )


def test_without_old_logprobs_the_ratio_is_one():
    close(value(clipped_loss, LOGPROBS, ADVANTAGES), [[-2.0] * 3, [1.0] * 3])
    close(value(psft_loss, LOGPROBS, ADVANTAGES), [[-1.0] * 3] * 2)


def test_rectified_is_the_share_of_tokens_below_tau():
    for loss in (gft_loss, gft_no_gal_loss):
        rectified = output(loss, LOGPROBS, ADVANTAGES, tau=0.5).metrics["rectified"]
        # p = 0.25, 0.5, 0.8; 0.5, 0.9, 0.125: below 0.5 are the first and the last.
        assert rectified.tolist() == [[True, False, False], [False, False, True]]


def test_clipped_losses_report_the_ratio_and_the_tokens_whose_gradient_is_clipped():
    logprobs = LOGPROBS.clone().requires_grad_()
    ratio = f64([0.5, 1.0, 1.5], [0.5, 1.0, 1.5])
    result = output(clipped_loss, logprobs, ADVANTAGES, old_logprobs=LOGPROBS - ratio.log(),
                    clip_low=0.2, clip_high=0.3)  # fmt: skip
    close(result.metrics["ratio"], ratio)
    # Advantages 2 and -1: too high a ratio in the first row, too low a one in the second.
    clipped = result.metrics["clip_fraction"]
    assert clipped.tolist() == [[False, False, True], [True, False, False]]
    result.per_token.sum().backward()
    assert torch.equal(logprobs.grad == 0, clipped)
    on_policy = output(clipped_loss, LOGPROBS, ADVANTAGES).metrics
    assert (on_policy["ratio"] == 1).all() and not on_policy["clip_fraction"].any()


# --- losses: gradients -----------------------------------------------------------------------


CLOSED_FORMS = {
    # Loss, and the factor f of d loss / d logits = -f (onehot - softmax), from A and p.
    "sft": (sft_loss, lambda A, p: torch.ones_like(p)),
    "dft": (dft_loss, lambda A, p: p),
    "gft": (gft_loss, lambda A, p: A * torch.where(p < 0.7, p, 1.0)),
    "gft_no_gal": (gft_no_gal_loss, lambda A, p: torch.where(p < 0.7, p, 1.0)),
    "gft_no_dcr": (gft_no_dcr_loss, lambda A, p: A.expand_as(p)),
    "clipped": (clipped_loss, lambda A, p: A.expand_as(p)),
    "psft": (psft_loss, lambda A, p: torch.ones_like(p)),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_gradient_in_closed_form(name: str):
    loss, factor = CLOSED_FORMS[name]
    logits, logprobs, onehot = scored(tokens=40)
    advantages = f64(1.5, -0.5, 0.0)
    value(loss, logprobs, advantages).sum().backward()
    probs, softmax = logprobs.detach().exp(), logits.detach().softmax(-1)
    assert (probs < 0.7).any() and (probs >= 0.7).any()
    expected = -factor(advantages[:, None], probs)[..., None] * (onehot - softmax)
    close(logits.grad, expected)


def test_gradient_of_the_clipped_surrogate_off_policy():
    # Rows: A > 0 keeps rho <= 1.3, A < 0 keeps rho >= 0.8; a kept token has -A rho dlogp.
    logprobs = LOGPROBS.clone().requires_grad_()
    old = (PROBS / f64(0.5, 1.0, 1.5)).log()
    loss = value(clipped_loss, logprobs, ADVANTAGES, old_logprobs=old, clip_low=0.2, clip_high=0.3)
    loss.sum().backward()
    close(logprobs.grad, [[-1.0, -2.0, 0.0], [0.0, 1.0, 1.5]])
    logprobs.grad = None
    value(psft_loss, logprobs, ADVANTAGES, old_logprobs=old).sum().backward()
    close(logprobs.grad, [[-0.5, -1.0, 0.0]] * 2)


def test_gradient_of_asft_in_closed_form():
    # Softmax regression towards the reference: d KL(ref || p) / d logits = softmax - ref.
    logits, logprobs, onehot = scored(tokens=40)
    reference = torch.randn(3, 40, 6, dtype=F64).softmax(-1)
    kl = (reference * (reference.log() - logits.log_softmax(-1))).sum(-1)
    value(asft_loss, logprobs, f64(1.5, -0.5, 0.0), reference_kl=kl, lam=0.3).sum().backward()
    probs, softmax = logprobs.detach().exp()[..., None], logits.detach().softmax(-1)
    close(logits.grad, -probs * (onehot - softmax) + 0.3 * (softmax - reference))


@pytest.mark.parametrize("tau", [0.0, 1.000001, 5.0])
def test_limits_of_tau_in_value_and_gradient(tau: float):
    advantages = f64(1.5, -0.5, 0.0)
    results = []
    for limit in (False, True):
        torch.manual_seed(3)
        logits, logprobs, _ = scored()
        if not limit:
            loss = value(gft_loss, logprobs, advantages, tau=tau)
        elif tau == 0:  # Plain advantage-weighted NLL.
            loss = advantages[:, None] * value(sft_loss, logprobs, advantages)
        else:  # Advantage-weighted DFT.
            loss = advantages[:, None] * value(dft_loss, logprobs, advantages)
        loss.sum().backward()
        results.append((loss.detach(), logits.grad))
    close(results[0][0], results[1][0], 1e-15)
    close(results[0][1], results[1][1], 1e-15)
    assert results[0][1].abs().max() > 0.01


def test_gft_with_every_advantage_one_is_gft_no_gal():
    close(value(gft_loss, LOGPROBS, f64(1, 1)), value(gft_no_gal_loss, LOGPROBS, ADVANTAGES), 0)


def test_the_table_costs_no_torch():
    code = "import sys, gft_lite.objective.losses; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
