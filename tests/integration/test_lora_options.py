"""Options of `policy.lora`: trained, hot-loaded, resumed, merged and read by plain peft."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console

from gft_lite.planning.model_shape import ModelShape
from gft_lite.policy.batching import Row
from gft_lite.policy.principal import first_factors
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.recipe.training_sections import OptimSettings
from gft_lite.rollout.transformers_engine import TransformersEngine
from gft_lite.runs import checkpoint
from gft_lite.tools.merge import merge
from gft_lite.training.optim import make_optimizer, set_rate
from gft_lite.utils.errors import RecipeError

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "rslora": {"use_rslora": True},
    "pissa": {"init": "pissa"},
    "olora_rslora": {"init": "olora", "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 6},
                 "alpha_pattern": {"v_proj": 16, "q_proj": 3}},
    "pissa_patterns": {"init": "pissa", "rank_pattern": {"q_proj": 2},
                       "alpha_pattern": {"up_proj": 5}},
    "selected": {"exclude_modules": ["k_proj", "layers.1.mlp"], "layers_to_transform": [1]},
    "dora": {"use_dora": True},
}  # fmt: skip
PROMPT, COMPLETION = (5, 6, 7, 40, 9), (9, 33, 71, 4, 50, 12, 28, 66)
SERVED = RolloutSettings(engine="vllm", dtype="float32", kv_cache_mib=8)
GAP = 1e-4  # Nats; fp32 on both sides.


@pytest.fixture(scope="module")
def model(save_random_models):
    config = transformers.Qwen2Config(
        vocab_size=261, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return save_random_models({"options": config})["options"]


def load(model, quantization="none", **lora):
    return load_policy(
        PolicySettings(
            model=str(model), quantization=quantization, dtype="float32", device="cpu",
            gradient_checkpointing=False, lora={"rank": 4, "alpha": 8} | lora,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    """One vLLM for all options."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip('needs vllm: pip install "gft-lite[vllm]"')
    from gft_lite.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(SERVED, load(model), tmp_path_factory.mktemp("engine"))
    yield engine
    engine.close()


def scores(policy):
    """Log-probs of the completion [T]."""
    [batch] = policy.batches([Row(PROMPT, COMPLETION)], 1000)
    return policy.token_scores(batch).logprobs


def train(policy, optimizer, steps=3):
    for _ in range(steps):
        policy.model.zero_grad()
        (-scores(policy).mean()).backward()
        set_rate(optimizer, 1e-2)
        optimizer.step()


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters().values()])


def gap(one, other):
    one, other = (torch.as_tensor(x, dtype=torch.float32) for x in (one, other))
    return (one - other).abs().max().item()


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_an_option_in_everything_that_reads_the_adapter(name, model, tmp_path, request):
    policy, ratio = load(model, **OPTIONS[name]), 4.0 if name == "rslora" else 1.0
    settings = OptimSettings(lora_plus_ratio=ratio)
    optimizer = make_optimizer(policy, settings)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    start, untouched = scores(policy), _plain_scores(plain)
    assert gap(start, untouched) < 1e-6
    with torch.enable_grad():
        train(policy, optimizer)
    trained = scores(policy)
    assert gap(trained, untouched) > 100 * GAP
    with policy.base():
        assert torch.equal(scores(policy), start)

    # Resumed from a checkpoint, the next step is the same to the bit.
    saved = checkpoint.save(tmp_path, 3, policy, optimizer, keep=1)
    other = load(model, **OPTIONS[name])
    resumed = make_optimizer(other, settings)
    checkpoint.restore(saved, other, resumed)
    with torch.enable_grad():
        train(policy, optimizer, 1)
        train(other, resumed, 1)
    assert torch.equal(weights(policy), weights(other))

    folder = policy.save_adapter(tmp_path / "adapter")
    expected = scores(policy)
    continued = load_policy(policy.settings.model_copy(update={"adapter": str(folder)}))
    assert torch.equal(scores(continued), expected)
    assert gap(_plain_scores(PeftModel.from_pretrained(plain, folder)), expected) < 1e-5
    found = merge(str(folder), tmp_path / "merged", dtype="float32", console=Console(quiet=True))
    assert found.gap < GAP
    assert found.effect > 100 * GAP

    served = TransformersEngine(RolloutSettings(), policy, tmp_path) if name == "dora" else None
    if not served:
        served = request.getfixturevalue("engine")
        assert served.take_over(SERVED, policy)  # All save ranks of at most 8.
    served.sync(folder, list(OPTIONS).index(name) + 1)
    assert gap(served.score(PROMPT, COMPLETION), expected) < GAP


def _plain_scores(model):
    ids = torch.tensor([[*PROMPT, *COMPLETION]])
    logits = model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[0, len(PROMPT) :, None])[:, 0]


def test_pissa_takes_the_steps_of_peft_on_a_shifted_base(model, tmp_path):
    """Weights and gradient norms of peft, where W - s B0 A0 is the base and B A the adapter."""
    policy, s, rank = load(model, init="pissa", use_rslora=True), 8 / 2, 4
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=8, use_rslora=True, target_modules="all-linear",
                        task_type="CAUSAL_LM")  # fmt: skip
    theirs = get_peft_model(base, config)
    ours = dict(policy.model.named_modules())
    for name, layer in theirs.named_modules():
        if isinstance(layer, LoraLayer):
            a = ours[name].lora_A["default"].weight.detach()[:rank]
            b = ours[name].lora_B["default"].weight.detach()[:, rank:]
            layer.lora_A["default"].weight.data = a.clone()
            layer.lora_B["default"].weight.data = b.clone()
            layer.get_base_layer().weight.data -= s * b @ a
    own = [p for p in theirs.parameters() if p.requires_grad]
    optimizers = make_optimizer(policy, OptimSettings()), torch.optim.AdamW(own, weight_decay=0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 3e-3
    for _ in range(5):
        (-scores(policy).mean()).backward()
        (-_plain_scores(theirs).mean()).backward()
        norms = [torch.nn.utils.clip_grad_norm_(p, 1.0).item()
                 for p in (list(policy.parameters().values()), own)]  # fmt: skip
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        assert gap(scores(policy), _plain_scores(theirs)) < GAP
        with policy.base():
            assert gap(scores(policy), _plain_scores(theirs)) > 100 * GAP


def test_first_factors_of_a_matrix_with_known_singular_values():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4, generator=generator))[0] for n in (6, 5))
    weight = u @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) @ v.T
    b, a = first_factors(weight, 2, "pissa")
    assert torch.linalg.svdvals(weight - b @ a)[:2].tolist() == pytest.approx([2, 1], abs=1e-4)
    assert torch.linalg.svdvals(b).tolist() == pytest.approx([8**0.5, 2], abs=1e-4)
    b, a = first_factors(weight, 2, "olora")
    assert (b.T @ b - torch.eye(2)).abs().max() < 1e-5
    assert (b.T @ (weight - b @ a)).abs().max() < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_with_a_scale(init, model):
    """PiSSA's s B0 A0 is the principal part of the weight; OLoRA's B0 is Q, whatever s is."""
    policy, s, rank = load(model, init=init, use_rslora=True), 8 / 2, 4
    layer = next(m for m in policy.model.modules() if isinstance(m, LoraLayer))
    with torch.no_grad():
        a, b = layer.lora_A["default"].weight[:rank], layer.lora_B["default"].weight[:, rank:]
        weight = layer.get_base_layer().weight
        if init == "olora":
            assert (b.T @ b - torch.eye(rank)).abs().max() < 1e-5
        else:
            left = torch.linalg.svdvals(weight)[rank:].norm().item()
            assert (weight - s * b @ a).norm().item() == pytest.approx(left, rel=5e-3)


def test_pissa_leaves_the_codes_of_an_nf4_base(model):
    """The factors are those of the dequantised weights."""
    policy, plain = load(model, "nf4", init="pissa"), load(model, "nf4")
    states = [p.model.state_dict() for p in (policy, plain)]
    codes = [name for name in states[0] if "lora" not in name]
    assert any("quant_state" in name for name in codes)
    assert all(torch.equal(states[0][name], states[1][name]) for name in codes)
    with torch.no_grad():
        assert torch.equal(scores(policy), scores(plain))
    train(policy, make_optimizer(policy, OptimSettings()))
    with torch.no_grad(), policy.base():
        assert torch.equal(scores(policy), scores(plain))


def test_ranks_and_scales_are_those_of_the_patterns(model):
    policy = load(model, **OPTIONS["pissa_patterns"])
    found = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in policy.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert found["model.layers.0.self_attn.q_proj"] == (4, 8 / 2)
    assert found["model.layers.1.mlp.up_proj"] == (8, 5 / 4)
    assert found["model.layers.1.mlp.down_proj"] == (8, 8 / 4)


@pytest.mark.parametrize("name", ["default", *OPTIONS])
def test_the_plan_counts_the_parameters_that_are_trained(name, model):
    from gft_lite.planning.memory import MemoryModel

    options = {"rank": 4, "alpha": 8} | OPTIONS.get(name, {})
    policy = load(model, **options)
    shape = ModelShape.from_config(json.loads((model / "config.json").read_text()))
    recipe = Recipe.from_tree({"policy": {"lora": options}, "rollout": {"engine": "transformers"}})
    planned = MemoryModel(shape, recipe, "cpu").lora_parameters
    assert planned == weights(policy).numel()


def test_loading_a_policy_switches_progress_bars_of_transformers_off(model):
    bars = transformers.utils.logging
    bars.enable_progress_bar()
    load(model)
    assert not bars.is_progress_bar_enabled()


def test_b_has_the_rate_of_lora_plus(model):
    policy = load(model)
    optimizer = make_optimizer(policy, OptimSettings(lora_plus_ratio=8))
    set_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in policy.parameters().items():
        assert rates[id(parameter)] == (8e-3 if ".lora_B." in name else 1e-3)


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        ({"exclude_modules": ["mpl"]}, "exclude_modules: must name modules of .*, got 'mpl'"),
        ({"exclude_modules": ["layers"]}, " must adapt at least one module of .*, got none"),
        ({"layers_to_transform": [1, 2]}, "layers_to_transform: must be layers of .*, which has 0 "
                                          "to 1, got 2"),
        ({"rank_pattern": {"q_porj": 2}}, "rank_pattern: must name adapted modules .*'q_porj'"),
        ({"alpha_pattern": {"q_proj": 2}, "target_modules": ["v_proj"]},
         "alpha_pattern: must name adapted modules of .*, got 'q_proj'"),
        ({"rank": 33, "init": "pissa"}, "rank: must be at most 32 for .*k_proj.*pissa, got 33"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_model(model, lora, text):
    with pytest.raises(RecipeError) as error:
        load(model, **lora)
    assert len(error.value.problems) == 1
    assert re.search(f"^policy.lora.{text}", str(error.value))


def test_an_adapter_of_other_options_is_refused(model, tmp_path):
    folder = load(model, init="pissa").save_adapter(tmp_path / "adapter")
    settings = load(model, use_rslora=True).settings.model_copy(update={"adapter": str(folder)})
    with pytest.raises(RecipeError) as error:
        load_policy(settings)
    assert [text.split(":")[0] for text in error.value.problems] == [
        "policy.lora.rank", "policy.lora.alpha", "policy.lora.use_rslora",
    ]  # fmt: skip
