"""Policy back ends without a GPU: what is refused, and what their one forward must agree on."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from gft_lite.cli import main
from gft_lite.policy.registry import BACKENDS, load_policy
from gft_lite.policy.unsloth_policy import UnslothPolicy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.utils.errors import RecipeError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def test_the_recipe_accepts_exactly_the_backends_of_the_table():
    assert set(get_args(PolicySettings.model_fields["backend"].annotation)) == set(BACKENDS)


@no_gpu
def test_without_a_gpu_unsloth_is_rejected_before_a_policy_is_imported(
    tmp_path, monkeypatch, capsys
):
    policies = ("bitsandbytes", "gft_lite.policy.qlora", "unsloth_zoo")
    for name in policies:
        monkeypatch.delitem(sys.modules, name, raising=False)
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "recipes/lab.yaml", "policy.backend=unsloth", *out]) == 2
    rule = "policy.backend: must be transformers without a CUDA GPU, got unsloth"
    assert rule in capsys.readouterr().err
    assert not set(policies) & set(sys.modules)
    assert not (tmp_path / "run").exists()


def test_a_policy_is_loaded_without_torchs_compiler():
    code = (
        "import sys, torch; from gft_lite.utils.imports import uncompiled_functions\n"
        "plain = torch.compile\n"
        "with uncompiled_functions():\n import bitsandbytes\n"
        "assert torch.compile is plain\n"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


@no_gpu
def test_unsloth_on_device_cpu_is_rejected():
    with pytest.raises(RecipeError, match="must be transformers without a CUDA GPU"):
        load_policy(PolicySettings(backend="unsloth", device="cpu"))


def test_the_unsloth_engine_requires_the_backend():
    with pytest.raises(RecipeError, match=r"with policy\.backend transformers"):
        load_policy(PolicySettings(), 0, RolloutSettings(engine="unsloth"))


def test_settings_that_unsloth_does_not_support_are_reported_at_once(capsys):
    wrong = ["policy.quantization=int8", "policy.double_quantization=false",
             "policy.attention=eager", "policy.gradient_checkpointing=1",
             "policy.offload_embedding=true", "policy.layout=shared"]  # fmt: skip
    assert main(["train", "recipes/lab.yaml", "policy.backend=unsloth", *wrong, "--dry-run"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(wrong)
    assert "policy.gradient_checkpointing: must be true or false with backend unsloth, got 1" in (
        "".join(errors)
    )
    Recipe.load("recipes/lab.yaml", ["policy.backend=unsloth"])


class _TupleDecoder(nn.Module):
    """A decoder with its cache as tuples, as Unsloth's."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, past_key_values=None, **inputs):
        cache = DynamicCache()
        for number, (keys, values) in enumerate(past_key_values or ()):
            cache.update(keys, values, number)
        out = self.plain(past_key_values=cache, **inputs)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        return BaseModelOutputWithPast(out.last_hidden_state, layers)


def test_decoding_with_a_cache_of_tuples_is_decoding(lab_policy):
    """Left-padded prompts, three tokens one by one, a row that leaves the batch."""
    lab_policy.model.eval()
    policy = UnslothPolicy(lab_policy.model, lab_policy.tokenizer, lab_policy.settings,
                           lab_policy.dtype)  # fmt: skip
    policy._decoder = _TupleDecoder(policy._decoder)
    caches = [DynamicCache(config=policy.config) for _ in range(2)]
    ids, mask = torch.tensor([[0, 20, 21], [22, 23, 24]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for step in range(3):
        with torch.no_grad():
            plain, ours = (
                each.next_token_logits(ids, cache, attention_mask=mask, position_ids=positions)
                for each, cache in zip((lab_policy, policy), caches, strict=True)
            )
        assert torch.equal(plain, ours)
        ids, mask, positions = plain.argmax(-1)[:, None], _longer(mask), positions[:, -1:] + 1
        if step == 1:
            keep = torch.tensor([1])
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            for cache in caches:
                cache.batch_select_indices(keep)


def _longer(mask):
    return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
