"""KL to the reference on the lab policy: zero at the start, right afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gft_lite import lab
from gft_lite.policy.batching import Row, cut
from gft_lite.policy.kl import divergence
from gft_lite.recipe.sections import RolloutSettings
from gft_lite.rollout.base import Request, Sampling
from gft_lite.rollout.registry import start_engine


def draw(policy, adapter):
    """Samples of the base or of the adapter, enough of them for an estimate to settle."""
    engine = start_engine(RolloutSettings(engine="transformers"), policy, Path())
    engine.sync(adapter, 1)
    prompts = [tuple(policy.tokenizer.encode(r["problem"])) for r in lab.rows("test", limit=24)]
    done = engine.generate([Request(p, tuple(range(12))) for p in prompts], Sampling(max_tokens=24))
    return [Row(p, c.token_ids) for p, cs in zip(prompts, done, strict=True) for c in cs]


def test_nothing_has_moved_at_the_start(lab_policy):
    rows = draw(lab_policy, None)[:8]
    for whose in ("reference", "policy"):
        found = divergence(lab_policy, rows, 4096, samples_of=whose)
        assert set(found.values()) == {0.0}
    assert divergence(lab_policy, [], 4096, samples_of="policy") == {}
    assert lab_policy.model.training


def test_all_figures_equal_a_plain_computation(lab_policy, full_distribution):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lab_policy.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    rows = draw(lab_policy, Path("x"))[:40]
    [batch] = cut(rows, 10**6)
    with torch.no_grad():
        policy = full_distribution(lab_policy, batch)
        with lab_policy.base():
            base = full_distribution(lab_policy, batch)
    kl = torch.distributions.kl_divergence
    ratio = base.log_prob(batch.targets) - policy.log_prob(batch.targets)
    expected = {
        "forward": kl(base, policy).mean(),
        "reverse": kl(policy, base).mean(),
        "forward_sample": ratio.mean(),
        "reverse_k3": (ratio.exp() - 1 - ratio).mean(),
    }
    assert expected["forward"] > 1e-3
    on_base = divergence(lab_policy, rows, 512, samples_of="reference")
    on_own = divergence(lab_policy, rows, 512, samples_of="policy")
    assert set(on_base) == {"forward", "reverse", "forward_sample"}
    assert set(on_own) == {"forward", "reverse", "reverse_k3"}
    for name, value in {**on_base, **on_own}.items():
        assert value == pytest.approx(expected[name].item(), rel=1e-4)


def test_the_budget_changes_nothing(lab_policy):
    with torch.no_grad():
        for parameter in lab_policy.parameters().values():
            parameter.add_(0.01)
    rows = draw(lab_policy, None)[:16]
    one = divergence(lab_policy, rows, 1, samples_of="reference")
    many = divergence(lab_policy, rows, 10**6, samples_of="reference")
    assert one == pytest.approx(many, rel=1e-4)
