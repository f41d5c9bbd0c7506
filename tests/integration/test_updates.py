"""Updates on one rollout: old log-probs where a method needs them, clipping, the KL of asft."""

from __future__ import annotations

import pytest
import torch

from gft_lite import lab
from gft_lite.objective.methods import METHODS
from gft_lite.objective.reduction import token_weights
from gft_lite.policy.batching import Row
from gft_lite.recipe.schema import Recipe
from gft_lite.training.learner import Learner

BUDGET = 8192  # The recipe's default of train.micro_batch_tokens.


@pytest.fixture
def moved(lab_policy):
    """A policy whose adapter does something, and which is not sure of the demonstrations."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lab_policy.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lab_policy


def recipe(method, *, updates=1, lr=1e-30, **objective):
    """By default with a learning rate that changes no weight."""
    return Recipe.from_tree(
        {
            "method": method,
            "objective": objective,
            **({"teacher": {"model": "another"}} if method == "opd" else {}),
            "optim": {"lr": lr, "schedule": "constant", "warmup": 0, "clip_norm": 1e9},
            "train": {"updates_per_rollout": updates},
        }
    )


def rows(policy, advantages):
    """One demonstration of the lab for each advantage, as rows of one update."""
    encode = policy.tokenizer.encode
    pairs = [
        (tuple(encode(row["problem"])), tuple(encode(row["expert"][0])))
        for row in lab.rows("train", limit=len(advantages))
    ]
    weights = token_weights([len(response) for _, response in pairs])
    return [Row(*pair, a, w) for pair, a, w in zip(pairs, advantages, weights, strict=True)]


class Recorded(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients it was given."""

    def __init__(self, policy):
        super().__init__(policy.parameters().values(), lr=0.0)
        self.gradients = []

    def step(self, closure=None):
        self.gradients.append(flat(p.grad for p in self.param_groups[0]["params"]))
        return super().step(closure)


def learner_of(policy, settings):
    """A learner with plain gradient descent, and its optimiser."""
    learner = Learner(policy, settings)
    learner.optimizer = Recorded(policy)
    return learner, learner.optimizer


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradient_of(policy, loss):
    return flat(torch.autograd.grad(loss, list(policy.parameters().values())))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("updates", [1, 2])
def test_old_logprobs_are_taken_only_where_they_count(lab_policy, method, updates):
    settings = recipe(method, updates=updates)
    prepared = Learner(lab_policy, settings).prepare_rows(rows(lab_policy, [1.0, -1.0]))
    expected = "old_logprobs" in METHODS[method].needs and updates > 1
    assert ["old_logprobs" in row.loss_inputs for row in prepared] == [expected] * 2


@pytest.mark.parametrize("method", ["grpo", "dapo", "psft"])
def test_later_updates_are_off_policy_and_clipped(moved, method):
    settings = recipe(method, updates=2, lr=1.0)
    advantages = [1.0, -1.0, 0.5, -2.0] if METHODS[method].group_advantages else [1.0] * 4
    learner, optimizer = learner_of(moved, settings)
    prepared = learner.prepare_rows(rows(moved, advantages))
    learner.update(prepared, 0.0)
    [batch] = moved.batches(prepared, BUDGET)
    logprobs = moved.token_scores(batch).logprobs
    ratio = (logprobs - batch.loss_inputs["old_logprobs"]).exp()
    assert ((ratio - 1).abs() > 1e-3).float().mean() > 0.5
    low, high = settings.objective.clip_low, settings.objective.clip_high
    too_far = torch.where(batch.advantages > 0, ratio > 1 + high, ratio < 1 - low)
    assert 0.05 < too_far.float().mean() < 0.95
    # A token that went too far is left alone, every other one has the ratio's gradient.
    left = torch.where(too_far, 0.0, -batch.weights * batch.advantages * ratio.detach())
    expected = gradient_of(moved, (left * logprobs).sum())
    metrics = learner.update(prepared, 0.5).metrics
    assert metrics["ratio"].value == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert metrics["clip_fraction"].value == pytest.approx(too_far.float().mean().item())
    assert (optimizer.gradients[1] - expected).norm() <= 1e-4 * expected.norm()


def test_asft_is_dft_and_the_pull_of_the_reference(moved):
    data, gradients = rows(moved, [1.0] * 4), []
    for settings in (recipe("dft"), recipe("asft", lam=0.0), recipe("asft", lam=0.3)):
        learner, optimizer = learner_of(moved, settings)
        learner.update(data, 0.0)
        gradients += optimizer.gradients
    [batch] = moved.batches(data, BUDGET)
    kl = moved.token_scores(batch, reference_kl=True).reference_kl
    expected = 0.3 * gradient_of(moved, (batch.weights * kl).sum())
    dft, free, held = gradients
    assert torch.equal(free, dft)
    assert (held - dft - expected).norm() <= 1e-4 * expected.norm()
    assert expected.norm() > 0.01 * dft.norm()


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_an_update_without_rows_is_skipped(lab_policy, kl):
    settings = recipe("dapo", kl=kl)
    assert Learner(lab_policy, settings).update([], 0.0).skipped == "flat"
