"""The correction for an engine that computes other log-probs than the trainer."""

from __future__ import annotations

import math

import pytest
import torch

from gft_lite.objective.importance import Importance, gap_metrics
from gft_lite.recipe.schema import Recipe
from gft_lite.training.step_loss import choose_importance

# w = 1/4, 1/2, 1, 2, 4, and a token that no engine sampled.
GAPS = torch.tensor(
    [-math.log(4), -math.log(2), 0.0, math.log(2), math.log(4), math.nan], dtype=torch.float64
)


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        (Importance(), [1, 1, 1, 1, 1, 1]),
        (Importance("token_truncate", cap=3.0), [0.25, 0.5, 1, 2, 3, 1]),
        (Importance("token_band", low=0.4, high=2.5), [0, 0.5, 1, 2, 0, 1]),
        (Importance("sequence_mask", cap=3.0), [0.25, 0.5, 1, 2, 0, 1]),
    ],
)
def test_weights(importance, expected):
    weights = importance.weights(GAPS)
    torch.testing.assert_close(weights, torch.tensor(expected).double(), rtol=0, atol=1e-12)


def test_metrics_of_the_gaps():
    found = gap_metrics(GAPS[1:4], Importance("token_truncate", cap=1.5))
    # w = 1/2, 1, 2: (3.5)^2 / (3 * 5.25) = 7/9.
    assert found == pytest.approx(
        {"mean": 2 * math.log(2) / 3, "p95": math.log(2), "effective": 7 / 9, "limited": 1 / 3}
    )
    band = gap_metrics(GAPS[:5], Importance("token_band", low=0.4, high=2.5))
    assert band["limited"] == pytest.approx(2 / 5)
    assert gap_metrics(torch.empty(0), Importance()) is None


@pytest.mark.parametrize(
    ("method", "engine", "mode", "expected"),
    [
        ("grpo", "vllm", "auto", "token_truncate"),
        ("dapo", "vllm_server", "auto", "token_truncate"),
        ("chord", "vllm", "auto", "token_truncate"),
        ("grpo", "transformers", "auto", "none"),
        ("gft", "vllm", "auto", "none"),
        ("psft", "vllm", "auto", "none"),
        ("gft", "transformers", "token_band", "token_band"),
        ("grpo", "vllm", "none", "none"),
    ],
)
def test_the_mode_of_a_method(method, engine, mode, expected):
    pytest.importorskip("vllm")
    tree = {"method": method, "objective": {"importance": {"mode": mode}},
            "rollout": {"engine": engine}}  # fmt: skip
    assert choose_importance(Recipe.from_tree(tree)).mode == expected
