"""Faults of models, tokenizers and LoRA settings that are reported before weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from gft_lite import lab
from gft_lite.cli import main
from gft_lite.evaluation.targets import find_targets
from gft_lite.policy.adapter_config import WEIGHTS
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import RecipeError

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the lab base."""
    return Path(shutil.copytree(lab.BASE, tmp_path / "model"))


@pytest.fixture
def no_weights(model) -> Path:
    """A base that passes every check but can't be loaded."""
    header = b"[]"  # Of the right form for the checks, but no header of safetensors.
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return model


def load(**settings):
    return load_policy(PolicySettings(gradient_checkpointing=False, **settings))


def problems_of(**settings) -> list[str]:
    """The errors of a policy that can't be loaded, each one line with rule, value and advice."""
    with pytest.raises(RecipeError) as caught:
        load(**settings)
    for problem in caught.value.problems:
        assert problem.startswith("policy.") and ": must " in problem and ", got " in problem
        assert problem.endswith(".") and "\n" not in problem and len(problem) < 500
    return caught.value.problems


def problem_of(**settings) -> str:
    [problem] = problems_of(**settings)
    return problem


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- folders ---------------------------------------------------------------------------------


def test_a_file_is_no_model(model):
    text = problem_of(model=str(model / "model.safetensors"))
    assert "got the file" in text


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ([], "as safetensors, got none, in"),
        (["model-q4.gguf"], "got model-q4.gguf, a GGUF file, which can't be trained"),
        (["config.json", "model-q4.gguf"], "got model-q4.gguf, a GGUF file"),
        (["pytorch_model.bin"], "got pytorch_model.bin, a pickle"),
        (["config.json", "x.gguf", "pytorch_model.bin"], "got pytorch_model.bin, a pickle"),
        (["model.safetensors"], "without config.json"),
        (["recipe.yaml"], "Set policy.adapter="),
        (["adapter_config.json"], "with an adapter. Set policy.adapter to it"),
        (["adapter_config.json", "config.json", "model.safetensors"], "with an adapter"),
    ],
)
def test_a_folder_that_is_no_base(tmp_path, files, part):
    for name in files:
        (tmp_path / name).write_text("{}")
    assert part in problem_of(model=str(tmp_path))


def test_architectures_that_do_not_generate(no_weights):
    config = no_weights / "config.json"
    change(config, model_type="weird")
    assert f"in transformers {transformers.__version__}, got" in problem_of(model=str(no_weights))
    transformers.T5Config().save_pretrained(no_weights)
    assert "a causal language model, got" in problem_of(model=str(no_weights))
    transformers.ViTConfig().save_pretrained(no_weights)
    assert "a causal language model, got" in problem_of(model=str(no_weights))


@pytest.mark.parametrize(
    "values",
    [{"num_attention_heads": 0}, {"hidden_size": "x"}, {"hidden_size": -1}, {"vocab_size": None},
     {"hidden_act": "none"}, {"pad_token_id": 10**6}],
)  # fmt: skip
def test_a_config_that_builds_no_model(no_weights, values):
    change(no_weights / "config.json", **values)
    assert "must be a model folder or hub id that loads" in problem_of(model=str(no_weights))


def test_a_stored_quantisation_must_be_the_recipes(no_weights):
    config = no_weights / "config.json"
    change(config, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "in gptq. Give the original model" in problem_of(model=str(no_weights))
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    change(config, quantization_config=stored)
    text = problem_of(model=str(no_weights), quantization="none")
    assert text.startswith("policy.quantization: must be nf4")


def test_a_model_stored_as_nf4_is_loaded_as_it_is(tmp_path, lab_policy):
    base = lab_policy.model.unload()
    base.save_pretrained(tmp_path / "nf4")
    lab_policy.tokenizer.save_pretrained(tmp_path / "nf4")
    name, stored = next((n, p) for n, p in base.named_parameters() if "q_proj" in n)
    policy = load(model=str(tmp_path / "nf4"))
    base = policy.model.unload()
    assert base.get_parameter(name).data.equal(stored.data)


# --- tokenizers and end tokens ---------------------------------------------------------------


@pytest.mark.parametrize("special", [False, True])
def test_a_token_without_an_embedding(no_weights, special):
    tokenizer = transformers.AutoTokenizer.from_pretrained(no_weights)
    size = len(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    tokenizer.chat_template = "{{ messages[0]['content'] }}<think>"
    tokenizer.save_pretrained(no_weights)
    text = problem_of(model=str(no_weights))
    assert f"with {size + 2} tokens and {size} embeddings, none of them for '<think>' ({size})" in (
        text
    )


def test_a_pad_and_an_unknown_token_that_transformers_adds_need_no_embedding(model):
    change(model / "tokenizer_config.json", pad_token=None, unk_token="<new>")
    policy = load(model=str(model))
    assert max(policy.tokenizer.get_vocab().values()) >= policy.config.vocab_size
    assert policy.pad_id == 1


def test_a_tokenizer_smaller_than_the_embedding_is_usual(tmp_path):
    config = transformers.AutoConfig.from_pretrained(lab.BASE)
    config.vocab_size += 59
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(lab.BASE).save_pretrained(tmp_path)
    assert load(model=str(tmp_path)).config.vocab_size == 320


@pytest.mark.parametrize("eos", [261, [1, 999], -1, [1, "2"], True])
def test_an_end_token_that_is_no_token(no_weights, eos):
    (no_weights / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    wrong = eos[1] if isinstance(eos, list) else eos
    text = problem_of(model=str(no_weights))
    assert "must have its EOS token among its 261 tokens" in text
    assert f"with id {wrong!r}." in text


def test_generation_configs_that_are_missing_or_broken(model):
    file = model / "generation_config.json"
    file.unlink(missing_ok=True)
    assert load(model=str(model)).eos_ids == {1}  # That of config.json and tokenizer.
    file.write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert load(model=str(model)).eos_ids == {1, 2}
    file.write_text("{")
    assert "generation_config.json" in problem_of(model=str(model))


# --- target modules --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("v_porj", "got 'v_porj'. Did you mean v_proj? It has down_proj, gate_proj, k_proj"),
        ("query_key_value", "got 'query_key_value'."),
        ("q_pro", "got 'q_pro'. Did you mean q_proj?"),
        ("proj", "got 'proj'."),
        ("embed_tokens", "got 'embed_tokens', of type Embedding."),
        ("mlp", "got 'mlp', of type Qwen2MLP."),
        ("input_layernorm", "got 'input_layernorm', of type Qwen2RMSNorm."),
        ("layers.9.self_attn.q_proj", "got 'layers.9.self_attn.q_proj'."),
    ],
)
def test_a_target_that_is_no_linear_module(no_weights, target, part):
    text = problem_of(model=str(no_weights), lora={"target_modules": ["q_proj", target]})
    assert text.startswith(
        f"policy.lora.target_modules: must name linear modules of {no_weights}, "
    )
    assert part in text


def test_every_wrong_target_is_named(no_weights):
    found = problems_of(model=str(no_weights), lora={"target_modules": ["a", "q_proj", "mlp"]})
    assert ["'a'" in found[0], "'mlp'" in found[1]] == [True, True] and len(found) == 2


def test_targets_by_name_and_by_path_are_adapted():
    policy = load(lora={"target_modules": ["v_proj", "layers.0.self_attn.q_proj", "lm_head"]})
    adapted = {name.rpartition(".lora_")[0] for name in policy.parameters()}
    layers = [f"base_model.model.model.layers.{n}.self_attn" for n in range(3)]
    expected = {f"{layer}.v_proj" for layer in layers}
    assert adapted == expected | {f"{layers[0]}.q_proj", "base_model.model.lm_head"}


def test_conv1d_layers_are_linear(tmp_path):
    config = transformers.GPT2Config(vocab_size=261, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(lab.BASE).save_pretrained(tmp_path)
    common = {"model": str(tmp_path), "quantization": "none"}
    assert len(load(**common, lora={"target_modules": ["c_attn"]}).parameters()) == 2
    assert "Did you mean c_attn?" in problem_of(**common, lora={"target_modules": ["c_atn"]})
    assert "of type Embedding" in problem_of(**common, lora={"target_modules": ["wte"]})


# --- policy.adapter --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """An adapter of rank 4, alpha 8, dropout 0.1 on two of the modules."""
    own = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    return load(lora=own).save_adapter(tmp_path_factory.mktemp("small") / "adapter")


def test_the_recipes_lora_settings_must_be_the_adapters(no_weights, small):
    common = {"model": str(no_weights), "adapter": str(small)}
    wrong = {"rank": 16, "alpha": 64, "dropout": 0.3, "target_modules": ["q_proj"]}
    assert problems_of(**common, lora=wrong) == [
        f"policy.lora.{name}: must be {want}, as in {small}, got {got}. "
        f"Set policy.lora.{name}={want}."
        for name, want, got in [
            ("rank", "4", "16"), ("alpha", "8", "64"), ("dropout", "0.1", "0.3"),
            ("target_modules", "[q_proj, v_proj]", "[q_proj]"),
        ]
    ]  # fmt: skip
    # What the recipe leaves out counts as well: the run's recipe and card would show it.
    assert len(problems_of(**common)) == 4


@pytest.mark.parametrize("targets", ["all-linear", LINEAR, LINEAR[::-1]])
def test_equal_targets_may_be_written_differently(tmp_path, targets):
    folder = load(lora={"rank": 2}).save_adapter(tmp_path / "adapter")
    lora = {"rank": 2, "target_modules": targets}
    assert len(load(adapter=str(folder), lora=lora).parameters()) == 2 * 7 * 3


def test_an_adapter_with_other_ranks_per_module(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "adapter"))
    change(folder / "adapter_config.json", rank_pattern={"v_proj": 8})
    lora = {"rank": 8, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    text = problem_of(adapter=str(folder), lora=lora)
    assert "with 6 that are missing, foreign or of another size" in text


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "pissa_niter_4 changes the base",
        ),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts model.embed_tokens of type Embed"),
        ({"target_modules": ["w9"]}, "{'w9'} not found in the"),
        ({"target_modules": "("}, "unterminated subpattern"),
        ({"peft_type": "IA3"}, "its peft_type is IA3, not LORA"),
    ],
)
def test_adapters_that_are_not_supported(no_weights, small, tmp_path, config, part):
    folder = Path(shutil.copytree(small, tmp_path / "adapter"))
    change(folder / "adapter_config.json", **config)
    assert part in problem_of(model=str(no_weights), adapter=str(folder))


def test_targets_by_regular_expression_are_named_as_a_list(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "adapter"))
    change(folder / "adapter_config.json", target_modules=r".*self_attn\.(q|v)_proj")
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    assert "Set policy.lora.target_modules=[q_proj, v_proj]." in problem_of(
        adapter=str(folder), lora=lora
    )
    lora["target_modules"] = ["q_proj", "v_proj"]
    assert len(load(adapter=str(folder), lora=lora).parameters()) == 12
    [target] = find_targets([str(folder)], PolicySettings())
    assert len(load_policy(target.policy).parameters()) == 12


def test_an_evaluation_takes_the_adapters_own_settings(small):
    [target] = find_targets([str(small)], PolicySettings(quantization="none"))
    lora = load_policy(target.policy).settings.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 8, 0.1)


def test_an_adapter_that_continues_names_the_base_it_is_trained_on(model, small, tmp_path, caplog):
    folder = Path(shutil.copytree(small, tmp_path / "adapter"))
    change(folder / "adapter_config.json", base_model_name_or_path="m/chatml/")
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["v_proj", "q_proj"]}
    policy = load(model=str(model), revision="abc", adapter=str(folder), lora=lora)
    [record] = [r for r in caplog.records if r.name.startswith("gft_lite")]
    assert record.getMessage() == (
        f"policy.adapter: {folder} names m/chatml/ as its base, not {model}. "
        f"The run continues on {model}."
    )
    written = policy.save_adapter(tmp_path / "next") / "adapter_config.json"
    config = json.loads(written.read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(model), "abc")
    [target] = find_targets([str(tmp_path / "next")], PolicySettings())
    assert (target.policy.model, target.policy.revision) == (str(model), "abc")


def test_an_adapter_of_the_same_base_elsewhere_is_no_reason_to_warn(small, tmp_path, caplog):
    folder = Path(shutil.copytree(small, tmp_path / "adapter"))
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["v_proj", "q_proj"]}
    for name in ("/opt/other/gft_lite/lab/base", None):
        change(folder / "adapter_config.json", base_model_name_or_path=name)
        load(adapter=str(folder), lora=lora)
    assert not [r for r in caplog.records if r.name.startswith("gft_lite")]


# --- what is written -------------------------------------------------------------------------


def test_the_config_of_an_adapter_has_its_targets_in_order(small, lab_policy, tmp_path):
    folders = [small, lab_policy.save_adapter(tmp_path / "adapter")]
    found = [json.loads((f / "adapter_config.json").read_text()) for f in folders]
    assert [config["target_modules"] for config in found] == [["q_proj", "v_proj"], LINEAR]


def test_the_tokenizer_is_written_beside_an_adapter_to_publish(model, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}="
    tokenizer.save_pretrained(model)
    policy = load(model=str(model))
    plain = policy.save_adapter(tmp_path / "plain")
    folder = policy.save_adapter(tmp_path / "adapter", with_tokenizer=True)
    assert {f.name for f in folder.iterdir()} > {f.name for f in plain.iterdir()}
    written = transformers.AutoTokenizer.from_pretrained(folder)
    assert written.chat_template == tokenizer.chat_template
    assert written.encode("12+34=46") == tokenizer.encode("12+34=46")
    assert load_file(folder / WEIGHTS).keys() == load_file(plain / WEIGHTS).keys()
    assert load(model=str(model), adapter=str(folder)).eos_ids == policy.eos_ids


# --- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("policy.lora.target_modules=[q_proj, v_porj]", "Did you mean v_proj?"),
        ("policy.adapter=ADAPTER", "policy.lora.alpha: must be 8, as in"),
        ("policy.model=EMPTY", "as safetensors, got none"),
    ],
)
def test_such_a_run_ends_with_2_before_it_has_a_folder(override, part, small, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    override = override.replace("ADAPTER", str(small)).replace("EMPTY", str(tmp_path / "empty"))
    # Nothing is planned, which would report a model without config.json itself.
    settings = ["policy.gradient_checkpointing=true", "train.micro_batch_tokens=4096",
                "rollout.engine=transformers"]  # fmt: skip
    out = tmp_path / "run"
    assert main(["train", "recipes/lab.yaml", *settings, override, "--out", str(out)]) == 2
    assert part in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()
