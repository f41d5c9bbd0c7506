"""The learning-rate schedule, against hand-computed values."""

from __future__ import annotations

import math

import pytest

from gft_lite.recipe.sections import OptimSettings
from gft_lite.training.learner import Update, combined
from gft_lite.training.optim import learning_rate


def rates(**settings):
    options = OptimSettings(lr=1.0, **settings)
    return [learning_rate(share, options) for share in (0.05, 0.15, 0.25, 0.5, 0.75, 1.0, 1.02)]


def test_constant():
    assert rates(schedule="constant", warmup=0) == [1.0] * 7


def test_linear_falls_to_zero_when_the_budget_is_spent():
    expected = [0.95, 0.85, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert rates(schedule="linear", warmup=0) == pytest.approx(expected)


def test_cosine():
    expected = [(1 + math.cos(math.pi * s)) / 2 for s in (0.05, 0.15, 0.25, 0.5, 0.75, 1, 1)]
    assert rates(schedule="cosine", warmup=0) == pytest.approx(expected)


def test_warmup_rises_to_the_rate_and_the_rest_is_scheduled_after_it():
    expected = [0.25, 0.75, 0.9375, 0.625, 0.3125, 0.0, 0.0]
    assert rates(schedule="linear", warmup=0.2) == pytest.approx(expected)


def test_combined_updates_weigh_tokens_and_keep_out_what_was_skipped():
    sums = {"tokens": 10, "forwarded": 15, "entropy_sum": 5.0, "rectified_sum": 4.0}
    ran = Update(0.1, 99, loss=2.0, grad_norm=1.0, **sums)
    sums |= {"tokens": 30, "forwarded": 40, "rectified_sum": 6.0}
    longer = Update(0.2, 88, loss=4.0, grad_norm=3.0, **sums)
    assert combined([ran, Update(0.15, 99, skipped="flat"), longer]) == {
        "updates": 2, "skipped": "flat", "lr": 0.2, "trained_tokens": 40, "forwarded_tokens": 55,
        "micro_batch_tokens": 88, "loss": 3.0, "grad_norm": 2.0, "entropy": 0.25,
        "rectified": 0.25,
    }  # fmt: skip


def test_what_is_not_a_number_is_null_in_json():
    bad = Update(0.1, 99, tokens=1, loss=float("nan"), grad_norm=float("inf"), skipped="non_finite")
    metrics = combined([bad])
    assert metrics["skipped"] == "non_finite"
    assert metrics["loss"] is None
    assert metrics["grad_norm"] is None
    assert metrics["updates"] == 0
