"""The transformers rollout engine: sampling, seeds, stop rules, and the weights it serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gft_lite import lab
from gft_lite.policy.batching import Row, cut
from gft_lite.recipe.sections import RolloutSettings
from gft_lite.rollout.base import Request, RolloutError, Sampling
from gft_lite.rollout.policy_engine import PolicyEngine
from gft_lite.rollout.registry import start_engine
from gft_lite.rollout.sync_check import SyncCheck
from gft_lite.rollout.transformers_engine import TransformersEngine, draw


@pytest.fixture
def engine(lab_policy):
    return start_engine(RolloutSettings(engine="transformers"), lab_policy, Path())


@pytest.fixture
def prompts(lab_policy):
    """Prompts of unequal length, so that batches are padded."""
    rows = lab.rows("retention", limit=3) + lab.rows("test", limit=3)
    return [tuple(lab_policy.tokenizer.encode(r["problem"])) for r in rows]


def move(policy):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_greedy_equals_a_plain_loop_without_cache_or_padding(lab_policy, engine, prompts):
    move(lab_policy)
    engine.sync(Path("anything"), 1)
    done = engine.generate([Request(p, (0,)) for p in prompts], Sampling(0.0, max_tokens=12))
    for prompt, [completion] in zip(prompts, done, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in completion.token_ids:
                ids.append(int(lab_policy.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tuple(ids[len(prompt) :]) == completion.token_ids


def test_log_probs_are_the_trainers_and_untempered(lab_policy, engine, prompts):
    move(lab_policy)
    engine.sync(Path("anything"), 1)
    requests = [Request(p, (1, 2)) for p in prompts]
    for group, request in zip(
        engine.generate(requests, Sampling(0.5, top_p=0.9, max_tokens=12)), requests, strict=True
    ):
        for completion in group:
            [batch] = cut([Row(request.prompt_ids, completion.token_ids)], 1)
            with torch.no_grad():
                expected = lab_policy.token_scores(batch).logprobs
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-5
            scored = engine.score(request.prompt_ids, completion.token_ids)
            assert (expected - torch.tensor(scored)).abs().max() < 1e-5


def test_a_sample_depends_on_its_seed_alone(engine, prompts):
    sampling = Sampling(1.0, max_tokens=16)
    together = engine.generate([Request(p, (11, 12, 13)) for p in prompts], sampling)
    for prompt, group in zip(reversed(prompts), reversed(together), strict=True):
        alone = engine.generate([Request(prompt, (12,))], sampling)[0][0]
        assert alone.token_ids == group[1].token_ids
    assert len({c.token_ids for group in together for c in group}) > len(prompts)


def test_sampling_leaves_the_global_random_state_alone(engine, prompts):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine.generate([Request(prompts[0], (1,))], Sampling(max_tokens=8))
    assert torch.equal(torch.rand(3), expected)


def test_base_and_adapter_are_served_as_synced(lab_policy, engine, prompts):
    greedy = Sampling(0.0, max_tokens=10)
    requests = [Request(p, (0,)) for p in prompts]
    base = engine.generate(requests, greedy)
    move(lab_policy)
    assert engine.generate(requests, greedy) == base
    engine.sync(Path("anything"), 1)
    assert engine.generate(requests, greedy) != base
    engine.sync(None, 0)
    assert engine.generate(requests, greedy) == base
    assert lab_policy.model.training


def test_a_sample_ends_at_eos_at_a_stop_string_or_at_the_length_limit(lab_policy, engine, prompts):
    requests = [Request(p, tuple(range(6))) for p in prompts]
    free = [c for g in engine.generate(requests, Sampling(max_tokens=40)) for c in g]
    ended = [c for c in free if c.finish_reason == "stop"]
    assert ended
    assert all(c.token_ids[-1] in lab_policy.eos_ids for c in ended)
    assert all(not lab_policy.eos_ids & set(c.token_ids[:-1]) for c in free)
    short = [c for g in engine.generate(requests, Sampling(max_tokens=2)) for c in g]
    assert {(len(c.token_ids), c.finish_reason) for c in short} == {(2, "length")}
    sampling = Sampling(max_tokens=40, stop=("#",))
    stopped = [c for g in engine.generate(requests, sampling) for c in g]
    texts = [lab_policy.tokenizer.decode(c.token_ids) for c in stopped]
    assert any(t.endswith("#") for t in texts)
    assert all("#" not in t[:-1] for t in texts)


def test_a_prompt_that_fills_the_context_is_an_error(lab_policy, engine):
    full = tuple([5] * lab_policy.context)
    with pytest.raises(RolloutError, match=f"prompt: must have 1 to {lab_policy.context - 1} tok"):
        engine.generate([Request(full, (0,))], Sampling())
    [[last]] = engine.generate([Request(full[:-1], (0,))], Sampling(max_tokens=9))
    assert len(last.token_ids) == 1


def test_draw_inverts_the_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(1000, 1)
    noise = (torch.arange(1000) + 0.5) / 1000
    tokens = draw(logits, noise, Sampling(1.0))
    assert tokens.bincount(minlength=4).tolist() == [100, 200, 300, 400]
    # p ** 2, normalised: 1, 4, 9, 16 of 30.
    tempered = draw(logits, noise, Sampling(0.5)).bincount(minlength=4)
    assert (tempered - torch.tensor([33.3, 133.3, 300.0, 533.3])).abs().max() <= 1
    assert set(draw(logits, noise, Sampling(1.0, top_k=2)).tolist()) == {2, 3}
    assert set(draw(logits, noise, Sampling(1.0, top_p=0.39)).tolist()) == {3}
    assert set(draw(logits, noise, Sampling(1.0, top_p=0.41)).tolist()) == {2, 3}
    assert set(draw(logits, noise, Sampling(0.0)).tolist()) == {3}
    highest = torch.tensor([1 - 2**-24] * 2)
    edge = torch.tensor([[0.0, 0.0, -1e9, -1e9]]).repeat(2, 1)
    assert draw(edge, highest, Sampling(1.0)).tolist() == [1, 1]


class TestSyncCheck:
    """An engine that does not serve the trainer's adapter is detected."""

    @pytest.fixture
    def check(self, lab_policy, engine, prompts):
        check = self.make(lab_policy, engine, prompts, 0.2)
        assert check.noise < 1e-5
        return check

    def make(self, policy, engine, prompts, limit):
        row = Row(prompts[-1], tuple(policy.tokenizer.encode("@104;231#231")))
        return SyncCheck(policy, row, limit, engine)

    def test_agreement_passes(self, lab_policy, engine, check):
        for _ in range(3):
            move(lab_policy)
            engine.sync(Path("anything"), 1)
            assert check.check(engine) < 1e-5

    def test_an_engine_that_still_serves_the_base_is_detected(self, lab_policy, engine, check):
        with torch.no_grad():  # A small step: the gap stays under the limit, the sync is missing.
            for name, parameter in lab_policy.parameters().items():
                if "lora_B" in name:
                    parameter.add_(1e-3)
        engine.sync(None, 1)
        with pytest.raises(RolloutError, match="must serve the new adapter, got the base"):
            check.check(engine)

    def test_a_gap_over_the_limit_is_an_error(self, lab_policy, engine, prompts):
        check = self.make(lab_policy, engine, prompts, 1e-3)
        move(lab_policy)
        engine.sync(None, 1)
        with pytest.raises(RolloutError, match=r"must agree within 0.001 nats per token"):
            check.check(engine)


def test_a_sync_leaves_only_the_newest_adapter_on_the_disk(lab_policy, engine, tmp_path):
    served = PolicyEngine(engine, lab_policy, tmp_path)
    for version in (1, 2, 3):
        served.sync_unchecked(version)
        assert [p.name for p in tmp_path.iterdir()] == [f"v{version}"]
        assert (tmp_path / f"v{version}" / "adapter_model.safetensors").exists()


def test_a_sync_is_checked(lab_policy, prompts, tmp_path):
    class Stale(TransformersEngine):
        """Serves the base whatever it is given."""

        def sync(self, adapter, version):
            super().sync(None, version)

    engine = Stale(RolloutSettings(), lab_policy, tmp_path)
    served = PolicyEngine(engine, lab_policy, tmp_path / "adapters")
    with pytest.raises(RuntimeError, match="start_checks must be called"):
        served.check(engine)
    served.start_checks(Row(prompts[-1], (5, 6, 7)), limit=5.0)
    move(lab_policy)
    served.sync_unchecked(1)
    with pytest.raises(RolloutError, match="must serve the new adapter, got the base"):
        served.sync(2)
