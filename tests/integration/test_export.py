"""`gft-lite merge`: weights computed by hand; log-probs by transformers, peft and vLLM."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from gft_lite import Recipe
from gft_lite.cli import main
from gft_lite.lab import BASE
from gft_lite.runs.folder import RunFolder
from gft_lite.runs.model_card import write_card
from gft_lite.tools.merge import merge
from gft_lite.training.run import train
from gft_lite.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["train.problems_per_step=4", "optim.lr=1e-2", "optim.warmup=0", "data.problems=32",
         "eval.samples=1", "eval.k=[1]", "eval.sets.test.problems=8",
         "eval.sets.retention.problems=8", "monitor.problems=4", "checkpoint.every=1"]  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """Three steps on the lab at a large learning rate."""
    recipe = Recipe.load("recipes/lab.yaml", ["train.steps=3", *SMALL])
    return train(recipe, tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory) -> Path:
    """The run, merged in float32."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge(str(run.path), folder, dtype="float32")
    return folder


def scaled(run: RunFolder, folder: Path, factor: float) -> Path:
    """A copy of the run's adapter with its update scaled by `factor`."""
    shutil.copytree(run.adapter, folder)
    state = load_file(folder / WEIGHTS)
    state = {k: v * factor if "lora_B" in k else v for k, v in state.items()}
    save_file(state, folder / WEIGHTS)
    return folder


def model(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def distribution(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """The log-probs [T, V] of the plain model, in fp64."""
    return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def tokens(run: RunFolder) -> list[int]:
    """A prompt and a response of the run."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    group = run.groups(3)[0]
    return tokenizer.encode(group["problem"]["text"]) + group["responses"][-1]["token_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merged_weights_are_base_plus_update_rounded_once(dtype, run, tmp_path):
    kept = merge(str(run.path), tmp_path / "out", dtype=dtype).kept
    adapter, kind = load_file(run.adapter / WEIGHTS), getattr(torch, dtype)
    expected, wanted, stored = {}, [], []
    for name, weight in load_file(BASE / "model.safetensors").items():
        weight = weight.to(kind)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            a, b = adapter[f"{key}.lora_A.weight"], adapter[f"{key}.lora_B.weight"]
            wanted.append(((b @ a) * (32 / 16)).flatten())  # alpha / rank
            stored.append(weight.float().flatten())
            weight = (weight.float() + wanted[-1].view_as(weight)).to(kind)
            stored[-1] = weight.float().flatten() - stored[-1]
        expected[name] = weight
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(wanted) == 3 * 7 and found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    cosine = torch.cosine_similarity(torch.cat(wanted), torch.cat(stored), dim=0)
    assert kept == pytest.approx(cosine.item(), abs=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype and "quantization_config" not in config


def test_transformers_and_peft_agree(run, merged):
    ids = tokens(run)
    base = distribution(model(BASE), ids)
    unmerged = distribution(PeftModel.from_pretrained(model(BASE), run.adapter), ids)
    found = distribution(model(merged), ids)
    assert (found - unmerged).abs().max() < 1e-4 < 0.1 < (found - base).abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    assert tokenizer.decode(ids) == transformers.AutoTokenizer.from_pretrained(BASE).decode(ids)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
def test_vllm_serves_the_merged_model(run, merged, tmp_path):
    from gft_lite.policy.registry import load_policy
    from gft_lite.recipe.sections import PolicySettings, RolloutSettings
    from gft_lite.rollout.base import Request, Sampling
    from gft_lite.rollout.registry import start_engine

    settings = PolicySettings(
        model=str(merged), quantization="none", dtype="float32", device="cpu", context=128
    )
    prompts = [Request(tuple(tokens(run)[:16]), (0,))]
    exact = RolloutSettings(engine="vllm", dtype="float32")
    engine = start_engine(exact, load_policy(settings), tmp_path)
    try:
        [[served]] = engine.generate(prompts, Sampling(temperature=0, max_tokens=16))
    finally:
        engine.close()
    unmerged = PeftModel.from_pretrained(model(BASE), run.adapter)
    ids = list(prompts[0].prompt_ids)
    for token, logprob in zip(served.token_ids, served.logprobs, strict=True):
        last = distribution(unmerged, ids)[-1]
        assert token == last.argmax()
        assert abs(logprob - last[token]) < 1e-4
        ids.append(token)


def test_the_comparison_uses_the_three_models(run, tmp_path):
    found = merge(str(run.path), tmp_path / "out", dtype="float32")
    assert found.gap < 1e-4 and found.largest < 1e-3 and found.kl < 1e-6
    rows = [(group, response) for group in run.groups(3) for response in group["responses"]
            if response["source"] == "self"]  # fmt: skip
    assert found.tokens == sum(len(response["token_ids"]) for _, response in rows)
    base, out = model(BASE), model(tmp_path / "out")
    gaps = []
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    for group, response in rows:
        prompt, answer = tokenizer.encode(group["problem"]["text"]), response["token_ids"]
        places = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        both = [distribution(m, prompt + answer)[places, answer] for m in (base, out)]
        gaps.append((both[0] - both[1]).abs())
    assert found.to_base == pytest.approx(torch.cat(gaps).mean().item(), rel=1e-4)
    assert found.effect == pytest.approx(found.to_base, rel=1e-3)
    # NF4 changes so small a base, but less than three large steps do.
    assert found.as_trained is not None and 10 * found.gap < found.as_trained < found.effect


@pytest.mark.parametrize("kind", ["ranks", "rslora", "dora"])
def test_adapters_written_by_peft(kind, run, tmp_path):
    options = {
        "ranks": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
    }[kind]
    modules = ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(0)
    made = get_peft_model(model(BASE), LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM", **options))  # fmt: skip
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    made.eval().save_pretrained(tmp_path / "adapter")
    found = merge(str(tmp_path / "adapter"), tmp_path / "out", dtype="float32")
    assert found.as_trained is None and found.effect > 0.1
    ids = tokens(run)
    assert (distribution(model(tmp_path / "out"), ids) - distribution(made, ids)).abs().max() < 1e-4


def test_a_checkpoint_is_merged(run, tmp_path):
    merge(f"{run.path}@step-2", tmp_path / "out", dtype="float32")
    adapter = run.checkpoints / "step-000002" / "adapter"
    unmerged = PeftModel.from_pretrained(model(BASE), adapter)
    ids = tokens(run)
    assert (distribution(model(tmp_path / "out"), ids)
            - distribution(unmerged, ids)).abs().max() < 1e-4  # fmt: skip
    assert "## Results" not in (tmp_path / "out" / "README.md").read_text()


def test_a_zero_adapter_leaves_the_base_unchanged(run, tmp_path):
    found = merge(str(scaled(run, tmp_path / "adapter", 0.0)), tmp_path / "out")
    assert (found.gap, found.effect, found.to_base, found.kept) == (0, 0, 0, 1)
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(weight, load_file(BASE / "model.safetensors")[name].bfloat16())


def test_an_update_that_bf16_rounds_away_is_an_error(run, tmp_path):
    adapter = scaled(run, tmp_path / "adapter", 3e-4)
    with pytest.raises(UserError, match="rounding would lose the update"):
        merge(str(adapter), tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}
    found = merge(str(adapter), tmp_path / "out", dtype="float32")
    assert found.kept > 0.99 and 10 * found.gap < found.effect


def test_over_the_limit_no_file_remains(run, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert main(["merge", str(run.path), "--out", str(out), "--limit", "1e-9"]) == 2
    assert "--limit: must be at least the gap" in capsys.readouterr().err
    assert not out.exists() and not any(tmp_path.glob("deep/*"))


def test_the_command_prints_the_next_commands(run, tmp_path, capsys):
    out = tmp_path / "my model"
    assert main(["merge", str(run.path), "--out", str(out), "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    assert f"convert_hf_to_gguf.py '{out}' --outfile '{out}.gguf' --outtype f32" in printed.out
    assert f"vllm serve '{out}'" in printed.out
    assert "for scale, what training changed" in printed.err


def test_unusable_targets_and_folders(run, tmp_path, capsys):
    for target in ("lab", f"{run.path}@all"):
        with pytest.raises(UserError, match="TARGET: must be one run"):
            merge(target, tmp_path / "out")
    with pytest.raises(UserError, match="--out: must be a new or empty folder"):
        merge(str(run.path), run.path)
    foreign = tmp_path / "run"
    shutil.copytree(run.path, foreign)
    recipe = foreign / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("trust_remote_code: false",
                                                 "trust_remote_code: true"))  # fmt: skip
    for command in (["merge", str(foreign), "--out", "x"], ["chat", str(foreign)]):
        assert main(command) == 2
        assert "--allow-code: must be given" in capsys.readouterr().err


def test_damaged_results_are_found_before_the_model_is_loaded(run, tmp_path):
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(
        b""
    )  # An error where it is loaded.
    (folder / "eval" / "base.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"eval/base\.json:1: must"):
        merge(str(folder), tmp_path / "out")


def test_the_merged_model_has_the_policys_end_tokens(run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    # In chat models a turn often ends with another token than EOS.
    config["chat_template"] = config["chat_template"].replace("<eos>", "<|user|>")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    # Some models are published like this; transformers reads it but does not write it.
    sampling = {"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(sampling))
    adapter = scaled(run, tmp_path / "adapter", 1.0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge(str(adapter), tmp_path / "out", dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.temperature, generation.top_p, generation.do_sample) == (0.6, 0.9, True)
    assert generation.eos_token_id == sorted(
        [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")]
    )
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], tokenize=False
    ) == "<|user|>12<|user|>"  # fmt: skip


# --- cards -----------------------------------------------------------------------------------


def test_the_card_of_a_run(run):
    card = ModelCard.load(run.adapter / "README.md")
    tags = ["lora", "gft-lite", "gft"]
    assert card.data.to_dict() == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": tags
    }  # fmt: skip
    results = json.loads((run.path / "eval" / "trained.json").read_text())["test"]
    low, high = results["pass@1_interval"]
    assert f"{results['pass@1']:.3f} [{low:.3f}, {high:.3f}] |" in card.text
    kl = run.summary()["trained"]["kl"]
    for text in ("tau 0.7", "learning rate 0.01", "arXiv 2604.14258", f"| {kl:.3f} |", "3 steps",
                 "96 responses (12 expert, 36 teacher, 48 self)", "problems of `lab`",
                 "--max-lora-rank 16"):  # fmt: skip
        assert text in card.text
    recipe = card.text.partition("````yaml\n")[2].partition("````")[0]
    assert recipe == (run.path / "recipe.yaml").read_text()


def test_a_card_names_no_place_of_this_machine(run, tmp_path):
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    (tmp_path / "rows.jsonl").write_text("")
    recipe = Recipe.load(copy.path / "recipe.yaml").model_dump()
    recipe["policy"] |= {"model": str(tmp_path / "my-base"), "adapter": "~/old/adapter"}
    recipe["data"] |= {"source": str(tmp_path / "rows.jsonl")}
    recipe["data"]["prompt"] |= {"style": "chat", "system": "/no_think"}
    copy.create(Recipe.from_tree(recipe).to_yaml())
    write_card(copy)
    text = (copy.adapter / "README.md").read_text()
    assert str(tmp_path) not in text and "~" not in text
    assert "model: my-base\n" in text and "source: rows.jsonl\n" in text
    assert "system: /no_think\n" in text and "from_pretrained('my-base'" in text
    assert "base_model" not in text and "datasets" not in text.partition("---\n#")[0]


def test_a_card_links_what_is_on_the_hub(run, tmp_path):
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    recipe = Recipe.load(copy.path / "recipe.yaml").model_dump()
    recipe["policy"]["model"], recipe["data"]["source"] = "Qwen/Qwen2.5-Math-1.5B", "openai/gsm8k"
    copy.create(Recipe.from_tree(recipe).to_yaml())
    write_card(copy)
    data = ModelCard.load(copy.adapter / "README.md").data
    assert data.base_model == "Qwen/Qwen2.5-Math-1.5B" and data.datasets == ["openai/gsm8k"]


def test_a_staged_run_has_a_card_of_the_whole_and_is_merged(tmp_path):
    stages = "stages=[sft, {method: grpo, reference: start}]"
    recipe = Recipe.load("recipes/lab.yaml", ["train.steps=1", stages, *SMALL])
    run = train(recipe, tmp_path / "two")
    card = ModelCard.load(run.adapter / "README.md")
    assert card.data.tags == ["lora", "gft-lite", "sft", "grpo"]
    assert "- `sft`" in card.text and "- `grpo`" in card.text and "2 steps" in card.text
    for readme in run.path.rglob("adapter/README.md"):
        if "checkpoints" not in readme.parts:
            assert str(tmp_path) not in readme.read_text()
    assert merge(str(run.path), tmp_path / "out", dtype="float32").gap < 1e-4
    merged = ModelCard.load(tmp_path / "out" / "README.md")
    assert merged.data.library_name == "transformers"
    assert "before merging" in merged.text and "`two`" in merged.text
    assert str(ROOT) not in merged.text and str(tmp_path) not in merged.text
