"""Checkpoints of the real policy and optimiser."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError

from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings
from gft_lite.recipe.training_sections import OptimSettings
from gft_lite.runs import checkpoint
from gft_lite.training.optim import make_optimizer
from gft_lite.utils.errors import RecipeError


def one_step(policy, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for parameter in policy.parameters().values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters().values()])


@pytest.fixture
def pair(lab_policy):
    return lab_policy, make_optimizer(lab_policy, OptimSettings())


def test_training_continues_bit_for_bit(pair, tmp_path):
    policy, optimizer = pair
    one_step(policy, optimizer, 1)
    saved = checkpoint.save(tmp_path, 1, policy, optimizer, keep=2, bad_steps=1)
    one_step(policy, optimizer, 2)

    other = load_policy(PolicySettings(gradient_checkpointing=False), seed=9)
    fresh = make_optimizer(other, OptimSettings())
    assert checkpoint.restore(saved, other, fresh) == (1, {"bad_steps": 1})
    assert not torch.equal(weights(other), weights(policy))
    one_step(other, fresh, 2)
    assert torch.equal(weights(other), weights(policy))


def test_only_the_newest_are_kept_and_partial_ones_do_not_count(pair, tmp_path):
    policy, optimizer = pair
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, policy, optimizer, keep=2)
    (tmp_path / "step-000011.tmp").mkdir()
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["step-000002", "step-000010"]


def test_protected_ones_are_kept_beside_the_newest(pair, tmp_path):
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, *pair, keep=1, protected={2, 9})
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-000002", "step-000004"]
    assert checkpoint.of_step(tmp_path, 2) == tmp_path / "step-000002"
    with pytest.raises(checkpoint.CheckpointError, match="step-000003: FileNotFoundError"):
        checkpoint.of_step(tmp_path, 3)


def test_safetensors_and_json_only(pair, tmp_path):
    policy, optimizer = pair
    one_step(policy, optimizer, 1)
    saved = checkpoint.save(tmp_path, 1, policy, optimizer, keep=1)
    suffixes = {p.suffix for p in saved.rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_a_truncated_file_is_not_loaded(pair, tmp_path):
    policy, optimizer = pair
    one_step(policy, optimizer, 1)
    saved = checkpoint.save(tmp_path, 1, policy, optimizer, keep=1)
    file = saved / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SafetensorError):
        checkpoint.restore(saved, policy, optimizer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA")
def test_a_paged_optimiser_needs_cuda(lab_policy):
    with pytest.raises(RecipeError, match=r"optim.name: must be auto or adamw without CUDA"):
        make_optimizer(lab_policy, OptimSettings(name="paged_adamw_8bit"))
