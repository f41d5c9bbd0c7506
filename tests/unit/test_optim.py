"""The learning-rate schedule, against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from gft_lite.objective.importance import Importance
from gft_lite.recipe.training_sections import OptimSettings
from gft_lite.training.optim import learning_rate
from gft_lite.training.updates import Mean, Update, aggregate_updates


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


def test_aggregated_metrics_are_means_per_token_without_skipped_updates():
    means = {"entropy": Mean(5.0, 10), "rectified": Mean(4.0, 10), "prefix": Mean(3.0, 2)}
    ran = Update(0.1, 99, 10, 15, loss=2.0, grad_norm=1.0, metrics=means)
    means = {"entropy": Mean(5.0, 30), "rectified": Mean(6.0, 30), "prefix": Mean()}
    longer = Update(0.2, 88, 30, 40, loss=4.0, grad_norm=3.0, metrics=means)
    assert aggregate_updates([ran, Update(0.15, 99, skipped="flat"), longer], Importance()) == {
        "updates": 2, "skipped": "flat", "lr": 0.2, "trained_tokens": 40, "forwarded_tokens": 55,
        "micro_batch_tokens": 88, "loss": 3.0, "grad_norm": 2.0, "entropy": 0.25,
        "rectified": 0.25, "objective": {"rectified": 0.25, "prefix": 1.5}, "engine_gap": None,
    }  # fmt: skip


def test_a_metric_is_a_mean_over_the_tokens_it_applies_to():
    assert Mean.of(torch.tensor([1.0, float("nan"), 3.0])) == Mean(4.0, 2)
    assert Mean.of(torch.tensor([True, False, True])) == Mean(2.0, 3)
    assert Mean.of(torch.tensor([float("nan")])).value is None
    assert math.isinf(Mean.of(torch.tensor([float("inf")])).value)


def test_what_is_not_a_number_is_null_in_json():
    bad = Update(0.1, 99, tokens=1, loss=float("nan"), grad_norm=float("inf"), skipped="non_finite")
    metrics = aggregate_updates([bad], Importance())
    assert metrics["skipped"] == "non_finite"
    assert metrics["loss"] is None
    assert metrics["grad_norm"] is None
    assert metrics["updates"] == 0
