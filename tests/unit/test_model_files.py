"""Model folders that can't be trained: one line and exit code 2 from every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gft_lite.cli import main
from gft_lite.policy.model_files import check_model_files
from gft_lite.recipe.base import is_hub_id
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.paths import PACKAGE

BASE = PACKAGE / "lab" / "base"
WEIGHTS = "model.safetensors"
INDEX = json.dumps({"weight_map": {"a": WEIGHTS, "b": "model-00002-of-00002.safetensors"}})


def config(**values: object) -> Callable[[Path], object]:
    """Sets fields of config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def written(name: str, content: bytes | str) -> Callable[[Path], object]:
    """Replaces a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def instead_of_weights(name: str) -> Callable[[Path], object]:
    """Renames the weights."""
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


CASES = {
    "gguf": (instead_of_weights("m.Q4_K_M.gguf"), "got m.Q4_K_M.gguf, a GGUF file, which can't be"),
    "pickle": (instead_of_weights("pytorch_model.bin"), "got pytorch_model.bin, a pickle, which"),
    "git lfs": (written(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "of Git LFS"),
    "empty weights": (written(WEIGHTS, b""), f"whose {WEIGHTS} is an interrupted download"),
    "a shard": (written(f"{WEIGHTS}.index.json", INDEX), "without model-00002-of-00002.safeten"),
    "an index": (written(f"{WEIGHTS}.index.json", "{}"), "has no weight_map"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "without config.json"),
    "broken config": (written("config.json", '{"a"'), "config.json that is a JSON object"),
    "empty config": (written("config.json", ""), "config.json that is a JSON object"),
    "list": (written("config.json", "[]"), "config.json that is a JSON object"),
    "binary": (written("config.json", b"\xff\xfe"), "config.json that is a JSON object"),
    "no type": (written("config.json", "{}"), "must have its model_type in config.json"),
    "encoder": (config(architectures=["BertForMaskedLM"]), "of class BertForMaskedLM"),
    "classifier": (config(architectures=["Qwen2ForSequenceClassification"]), "Classification"),
    "seq2seq": (config(model_type="t5", is_encoder_decoder=True), "'t5', with an encoder"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "in gptq"),
    "awq": (config(quantization_config={"quant_method": "awq"}), "in awq"),
    "fp8": (config(quantization_config={"quant_method": "fp8"}), "in fp8"),
    "int8": (
        config(quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"}),
        "policy.quantization: must be int8",
    ),
    "an adapter": (written("adapter_config.json", "{}"), "with an adapter. Set policy.adapter"),
}


def damaged(name: str, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(BASE, tmp_path / "model"))
    CASES[name][0](folder)
    return folder


def stderr_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(command) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_commands_with_a_recipe_print_one_line_before_anything_is_loaded(name, tmp_path, capsys):
    folder, out = damaged(name, tmp_path), tmp_path / "out"
    recipe = ["recipes/lab.yaml", f"policy.model={folder}"]
    for command in (["train", *recipe, "--out", str(out)], ["groups", *recipe, "--out", str(out)],
                    ["plan", *recipe]):  # fmt: skip
        [line] = stderr_of(command, capsys).splitlines()
        assert CASES[name][1] in line and str(folder) in line, command
        assert line.startswith("policy.") and line.endswith("."), command
        assert not out.exists()


@pytest.mark.parametrize("name", [name for name in CASES if name != "an adapter"])
def test_commands_with_a_target_end_with_the_same_line(name, tmp_path, capsys):
    folder, adapter = damaged(name, tmp_path), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    written_config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(written_config))
    for command in (["eval", str(folder), "--suite", "lab", "--out", str(tmp_path / "e")],
                    ["chat", str(folder), "--prompt", "?"],
                    ["merge", str(adapter), "--out", str(tmp_path / "m")]):  # fmt: skip
        last = stderr_of(command, capsys).splitlines()[-1]
        assert CASES[name][1] in last or "must hold a config.json" in last, command
        assert not (tmp_path / "m").exists()


def test_names_that_are_no_model(tmp_path, capsys):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    for name, part in ((gguf, "a GGUF file, which can't be trained"),
                       (tmp_path / "nowhere", "which does not exist. Check the path."),
                       (BASE / "config.json", "Give the folder that holds it.")):  # fmt: skip
        command = ["train", "recipes/lab.yaml", f"policy.model={name}", "--out", f"{tmp_path}/o"]
        assert part in stderr_of(command, capsys)


def test_a_folder_of_gguf_files_is_no_target(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for command in ("eval", "chat"):
        more = ["--suite", "lab"] if command == "eval" else []
        assert "a GGUF file" in stderr_of([command, str(tmp_path), *more], capsys)


def test_what_is_no_error(tmp_path):
    """A missing generation config, a bare config for the plan, a hub id that is not there yet."""
    folder = Path(shutil.copytree(BASE, tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    check_model_files(PolicySettings(model=str(folder)))
    check_model_files(PolicySettings(model="some/hub-id"))
    (folder / WEIGHTS).unlink()
    check_model_files(PolicySettings(model=str(folder)), needs_weights=False)
    with pytest.raises(RecipeError, match="safetensors, got none"):
        check_model_files(PolicySettings(model=str(folder)))


@pytest.mark.parametrize(
    "name", ["ü/ö", f"a/{'b' * 97}", f"{'a' * 97}/b", "a/b-", "a/.b", "-a/b", "a/b--c", "a/b..c",
             "a/b.git"],
)  # fmt: skip
def test_what_the_hub_rejects_is_no_hub_id(name):
    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    assert not is_hub_id(name)


@pytest.mark.parametrize("name", ["a/b", "Qwen/Qwen2.5-0.5B", "_a/b_", f"{'a' * 96}/{'b' * 96}"])
def test_what_the_hub_accepts_is_a_hub_id(name):
    validate_repo_id(name)
    assert is_hub_id(name)
