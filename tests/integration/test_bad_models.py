"""Broken or hostile models and adapters: one clear error each, and no pickle is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gft_lite.cli import main
from gft_lite.data.problems import load_problems
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import DataSettings, PolicySettings
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.paths import PACKAGE

BASE = PACKAGE / "lab" / "base"
WEIGHTS = "adapter_model.safetensors"


class Pwn:
    """Creates the file ./pwned when it is unpickled."""

    def __reduce__(self):
        return os.close, (os.open("pwned", os.O_CREAT),)


def load(**settings):
    return load_policy(PolicySettings(gradient_checkpointing=False, **settings))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """An adapter of the lab's base."""
    return load().save_adapter(tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def adapter(good, tmp_path) -> Path:
    """A copy of the good adapter, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the lab's base, to be damaged."""
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def change(file: Path, **values) -> None:
    """Set fields of a JSON file; None removes a field."""
    tree = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


def change_weights(file: Path, make) -> None:
    save_file(make(load_file(file)), file, metadata={"format": "pt"})


def error_of(**settings) -> str:
    with pytest.raises(RecipeError) as caught:
        load(**settings)
    [text] = caught.value.problems
    assert len(text) < 450
    return text


# --- pickles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", [False, True])
def test_pickles_are_rejected_and_not_read(hostile, model, adapter, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder, weights, other, settings in (
        (model, "model.safetensors", "pytorch_model.bin", {"model": str(model)}),
        (adapter, WEIGHTS, "adapter_model.bin", {"adapter": str(adapter)}),
    ):
        state = load_file(folder / weights) | ({"x": Pwn()} if hostile else {})
        (folder / weights).unlink()
        torch.save(state, folder / other)
        Path("pwned").unlink(missing_ok=True)  # Pickling it has made it, too.
        text = error_of(**settings)
        assert f"safetensors, got {other}, a pickle, which can run code when it is read" in text
        assert not Path("pwned").exists()
    # A file of another name beside the pickle makes no difference.
    shutil.copy(BASE / "model.safetensors", adapter / "other.safetensors")
    assert "a pickle" in error_of(adapter=str(adapter))


def test_a_reader_of_datasets_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.pkl").write_bytes(pickle.dumps(Pwn()))
    Path("pwned").unlink()
    for reader in ("pandas", "json", "text", "imagefolder", "webdataset"):
        with pytest.raises(RecipeError, match=r"^data\.source: no such .* written owner/name"):
            load_problems(DataSettings(source=reader, file="x.pkl"), None)  # type: ignore[arg-type]
    assert not Path("pwned").exists()


def test_code_beside_a_model_does_not_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model / "evil.py").write_text("open('pwned', 'w')\nclass C: pass\nclass M: pass\n")
    mapped = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    change(model / "config.json", auto_map=mapped)
    assert load(model=str(model)).config.model_type == "qwen2"  # transformers' own code serves.
    change(model / "config.json", model_type="weird")
    assert "of type 'weird'. It brings its own code: set policy.trust" in error_of(model=str(model))
    assert not Path("pwned").exists()


# --- adapters --------------------------------------------------------------------------------


def drop_some(state):
    return dict(list(state.items())[4:])


ADAPTERS = {
    "rank": ({"r": 4}, None, {"lora": {"rank": 4}}, "with 42 that are missing, foreign or of"),
    "target modules not there": ({"target_modules": ["w9"]}, None, {}, "{'w9'} not found in the"),
    "fewer target modules": ({"target_modules": ["q_proj"]}, None, {}, "with 36 that are missing"),
    "missing tensors": ({}, drop_some, {}, "with 4 that are missing, foreign or of another size"),
    "foreign tensors": ({}, lambda s: s | {"x.lora_A.weight": torch.zeros(2)}, {}, "with 1 that"),
    "another size": (
        {}, lambda s: {n: t.repeat(1, 2) for n, t in s.items()}, {}, "with 42 that are missing"
    ),
    "not finite": ({}, lambda s: {n: t / 0 for n, t in s.items()}, {}, "is not finite"),
    "another base": (
        {"base_model_name_or_path": "a/other-base"}, None, {},
        "must be an adapter of lab, got",
    ),
    "no LoRA": (
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "token_dim": 8}, None, {},
        "must be a PEFT adapter of lab",
    ),
    "unknown kind": ({"peft_type": "WAT"}, None, {}, "must be a PEFT adapter of lab"),
    "no kind": ({"peft_type": None}, None, {}, "must be a PEFT adapter of lab"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_does_not_fit(name, adapter):
    config, weights, settings, part = ADAPTERS[name]
    change(adapter / "adapter_config.json", **config)
    if weights:
        change_weights(adapter / WEIGHTS, weights)
    assert part in error_of(adapter=str(adapter), **settings)


def test_an_adapter_folder_that_cannot_be_read(adapter, good, tmp_path):
    (adapter / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:500])
    assert "SafetensorError" in error_of(adapter=str(adapter))
    (adapter / WEIGHTS).unlink()
    assert "safetensors, got none, in" in error_of(adapter=str(adapter))
    shutil.copy(good / WEIGHTS, adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "must be a PEFT adapter of lab" in error_of(adapter=str(adapter))
    assert "must be a PEFT adapter of lab" in error_of(adapter=str(tmp_path / "nowhere"))


def test_a_checkpoint_with_missing_tensors_does_not_keep_the_old_ones(adapter, lab_policy):
    before = {n: p.clone() for n, p in lab_policy.parameters().items()}
    change_weights(adapter / WEIGHTS, drop_some)
    with pytest.raises(RecipeError, match=r"^adapter: must have the weights .* with 4 that"):
        lab_policy.load_adapter(adapter)
    assert all(torch.equal(p, before[n]) for n, p in lab_policy.parameters().items())


def test_eval_targets_that_are_broken(adapter, capsys, tmp_path):
    command = ["eval", str(adapter), "--suite", "lab", "--out", str(tmp_path / "out")]
    config = adapter / "adapter_config.json"
    for text in ("{", "[]", '{"peft_type": "LORA"}', '{"r": "x"}'):
        config.write_text(text)
        assert main(command) == 2
        assert capsys.readouterr().err.startswith("TARGET: must ")
    config.write_text('{"r": 16}')
    (adapter / WEIGHTS).unlink()
    torch.save({}, adapter / "adapter_model.bin")
    assert main(command) == 2
    assert f"TARGET: must hold {WEIGHTS}" in capsys.readouterr().err


# --- models and tokenizers -------------------------------------------------------------------


def test_models_that_are_broken(model):
    config, weights = model / "config.json", model / "model.safetensors"
    whole, text = weights.read_bytes(), config.read_text()
    change_weights(weights, lambda s: dict(list(s.items())[1:]))
    assert "whose files lack " in error_of(model=str(model))
    weights.write_bytes(whole[:5000])
    assert "SafetensorError" in error_of(model=str(model))
    weights.write_bytes(whole)
    change(config, hidden_size=2 * json.loads(text)["hidden_size"])
    assert "whose files have another size of 21, such as" in error_of(model=str(model))
    config.write_text("{")
    assert "must have a config.json that is a JSON object" in error_of(model=str(model))
    config.write_text(text)
    assert load(model=str(model)).context == 2048


def test_a_tokenizer_without_pad_pads_with_eos(model):
    """transformers would invent a pad token that the model has no embedding for."""
    change(model / "tokenizer_config.json", pad_token=None)
    policy = load(model=str(model))
    assert policy.pad_id == 1 and policy.eos_ids == {1}
    assert policy.tokenizer.pad_token_id == policy.config.vocab_size


def test_a_tokenizer_without_eos_or_vocabulary_is_rejected(model):
    change(model / "tokenizer_config.json", eos_token=None, pad_token=None)
    assert "must have its EOS token among its 261 tokens" in error_of(model=str(model))
    (model / "tokenizer.json").write_text("{}")
    assert "must be a model folder or hub id that loads" in error_of(model=str(model))
    (model / "tokenizer.json").unlink()
    assert "must have a tokenizer with a vocabulary" in error_of(model=str(model))


def test_rewards_that_compare_need_answers():
    rule = "columns.answer: must name a column, as reward math compares with it, got null"
    none = {"columns": {"answer": None}}
    tree = {"data": none, "eval": {"sets": {"a": none}}}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree(tree)
    # A set without answers can be evaluated by the likelihood of its demonstrations.
    assert caught.value.problems == [f"data.{rule}."]
    Recipe.from_tree(tree | {"reward": {"functions": ["format", "my:own"]}})
