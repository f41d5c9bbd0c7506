"""Today's model families: a tiny random model of each is trained, and its layout is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gft_lite import lab
from gft_lite.cli import main
from gft_lite.planning.model_shape import find_shape
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.training.learner import Learner
from gft_lite.utils.errors import RecipeError

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GEMMA3 = SHAPE | {"head_dim": 32, "sliding_window": 6, "sliding_window_pattern": 2}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE),
    # A layer in four has no positions.
    "smollm3": transformers.SmolLM3Config(**SHAPE),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=32),
    "gemma3_text": transformers.Gemma3TextConfig(**GEMMA3),
    "gemma3": transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**GEMMA3).to_dict(),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
    ),
    # Query, key and value in one linear, three quarters of each head rotated, every layer with a
    # window.
    "phi3": transformers.Phi3Config(
        **SHAPE,
        sliding_window=6,
        partial_rotary_factor=0.75,
        rope_scaling=LONGROPE,
        original_max_position_embeddings=256,
    ),
}
# Neither is among the planner's types. Gemma 2's soft-capped scores don't go through segments.
OTHERS = {
    "olmo2": transformers.Olmo2Config(**SHAPE),
    "gemma2": transformers.Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=None),
}


@pytest.fixture(scope="module")
def folders(save_random_models):
    """A random model of each family."""
    return save_random_models(FAMILIES | OTHERS)


def gradient(folder, layout):
    """The gradient of two groups whose rows are longer than the windows, and the layout."""
    settings = PolicySettings(
        model=str(folder), quantization="none", gradient_checkpointing=False, layout=layout
    )
    policy = load_policy(settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy.model.train()
    generator.manual_seed(3)

    def tokens(length):
        return tuple(torch.randint(3, 512, (length,), generator=generator).tolist())

    rows = []
    for prompt in (tokens(23), tokens(9)):
        lengths = torch.randint(1, 30, (4,), generator=generator).tolist()
        rows += [
            Row(prompt, tokens(n), a, 0.01) for n, a in zip(lengths, (1, -1, 2, -2), strict=True)
        ]
    # Without rectification, whose step at tau a rounded probability may fall off.
    Learner(policy, Recipe.from_tree({"method": "gft_no_dcr"})).gradient(rows)
    grads = [p.grad for p in policy.parameters().values()]
    assert all(g is not None for g in grads), "parameters that training never reaches"
    return torch.cat([g.flatten() for g in grads]).double(), policy.layout


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_shares_prompts_with_the_gradient_of_padded_rows(folders, name):
    padded, _ = gradient(folders[name], "padded")
    assert padded.norm() > 0
    for layout in ("auto", "packed"):
        found, chosen = gradient(folders[name], layout)
        assert chosen == ("shared" if layout == "auto" else layout)
        assert (found - padded).norm() < 1e-5 * padded.norm()


RECIPE = """
policy: {model: lab, threads: 1}
data: {source: lab, problems: 16, holdout: 2}
group: {expert: 1, teacher: 1, self: 2}
reward: {functions: [{name: exact, parameters: {marker: "#"}}]}
rollout: {engine: transformers, max_tokens: 32}
train: {steps: 2, problems_per_step: 2}
monitor: {problems: 2}
eval: {samples: 1, k: [1]}
"""


def train(folder, out, *overrides):
    recipe = out.with_suffix(".yaml")
    recipe.write_text(RECIPE)
    words = ["train", str(recipe), f"policy.model={folder}", *overrides, "--out", str(out)]
    return main(words)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_trained_in_nf4(folders, name, tmp_path, capsys):
    assert train(folders[name], tmp_path / "run") == 0
    printed = capsys.readouterr().err
    assert "layout of micro-batches: shared\n" in printed
    assert "memory plan: none" not in printed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    layers = {key.partition(".layers.")[2].partition(".")[0] for key in weights}
    assert layers == {"0", "1", "2", "3"}
    assert not any("vision" in key for key in weights)


def test_an_unknown_family_is_trained_and_says_what_it_loses(folders, tmp_path, capsys):
    auto = ["policy.gradient_checkpointing=auto", "train.micro_batch_tokens=auto"]
    assert train(folders["gemma2"], tmp_path / "a", *auto) == 0
    printed = capsys.readouterr().err
    assert (
        "layout of micro-batches: packed; gemma2 with backend transformers and attention sdpa does "
        "not support shared: each response computes its prompt again\n" in printed
    )
    assert "memory plan: an estimate: no tested formulas for type 'gemma2'" in printed
    assert train(folders["olmo2"], tmp_path / "b") == 0
    assert "layout of micro-batches: shared\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", FAMILIES)
def test_the_planner_counts_every_parameter(folders, name):
    shape = find_shape(str(folders[name]))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name])
    assert shape.linear_parameters + shape.plain_parameters == model.num_parameters()


def test_longrope_ends_at_its_original_context(folders):
    policy = load_policy(PolicySettings(model=str(folders["phi3"]), quantization="none"))
    assert policy.context == 256 == find_shape(str(folders["phi3"])).context


def test_a_window_by_the_mask_alone_is_not_shared(folders, monkeypatch):
    """A model whose layers don't pass their window on gives other states with segments."""
    import transformers.models.mistral.modeling_mistral as code

    forward = code.MistralAttention.forward

    def without_window(self, *args, **kwargs):
        window, self.config.sliding_window = self.config.sliding_window, None
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config.sliding_window = window

    config = transformers.MistralConfig(**SHAPE, sliding_window=200)
    folder = Path(folders["llama"]).parent / "mask_alone"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(lab.BASE).save_pretrained(folder)
    settings = PolicySettings(model=str(folder), quantization="none")
    assert load_policy(settings).layout == "shared"
    monkeypatch.setattr(code.MistralAttention, "forward", without_window)
    policy = load_policy(settings)
    assert policy.layout == "packed"
    assert policy.config.sliding_window == 200


def test_attention_without_sdpa_is_an_error_that_names_eager(tmp_path):
    config = transformers.GptOssConfig(
        **SHAPE, num_local_experts=2, num_experts_per_tok=1, head_dim=16
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(lab.BASE).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"policy\.attention: must be eager for .* gpt_oss, got"):
        load_policy(PolicySettings(model=str(tmp_path), quantization="none"))
