"""The engine's copy of the base: written once, complete, of the right base, and how exact."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import resource
import signal
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gft_lite import lab
from gft_lite.data.prompts import PromptFormat
from gft_lite.policy import serving_base as serving
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, PromptSettings, RolloutSettings
from gft_lite.rollout import vllm_common as vllm_shared
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.paths import cache_folder

KIND = "nf4_dequantised"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty user cache."""
    monkeypatch.setenv("GFT_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


def policy_of(**settings):
    return load_policy(PolicySettings(gradient_checkpointing=False, **settings))


def written_state(file):
    """What only writing the file changes: reading it may change its access time."""
    state = file.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


def test_a_base_is_written_once_and_found_again(cache):
    first, second = policy_of(), policy_of(lora={"rank": 4, "alpha": 8})
    written = first.serving_base(KIND)
    folder = Path(written.location)
    before = written_state(folder / "model.safetensors")
    assert re.fullmatch(rf"{KIND} \({folder}, written in \d+\.\d s\)", written.about)
    # The second policy has another adapter on the same base.
    reused = second.serving_base(KIND)
    assert reused.location == written.location
    assert reused.about == f"{KIND} ({folder}, reused)"
    assert written_state(folder / "model.safetensors") == before
    assert [f.name for f in cache.iterdir()] == [folder.name]
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_temperature_without_sampling_is_written_as_transformers_takes_it():
    policy = policy_of()
    own = policy.model.get_base_model().generation_config
    own.temperature = 0.6
    written = Path(policy.serving_base(KIND).location) / "generation_config.json"
    found = json.loads(written.read_text())
    assert (found["temperature"], found["do_sample"]) == (0.6, True)
    assert not own.do_sample


def test_other_numbers_are_another_base(tmp_path):
    copy = tmp_path / "copy"
    policy = policy_of()
    policy.model.get_base_model().config.save_pretrained(copy)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        (copy / name).write_bytes((lab.BASE / name).read_bytes())
    weights = load_file(copy / "model.safetensors")
    name = next(n for n in weights if "down_proj" in n)
    weights[name][3, 5] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    policies = [
        policy, policy_of(model=str(copy)), policy_of(dtype="bfloat16"),
        policy_of(double_quantization=False), policy_of(quantization="int8"),
    ]  # fmt: skip
    folders = {each.serving_base(KIND).location for each in policies}
    assert len(folders) == len(policies)
    # What else is served with the weights is part of the hash, and of the key in the index.
    base = policy.model.get_base_model()
    for change in (
        lambda: policy.tokenizer.add_tokens("new"),
        lambda: setattr(policy.tokenizer, "chat_template", "{{ messages }}"),
        lambda: setattr(base.generation_config, "repetition_penalty", 1.5),
    ):
        change()
        other = policy.serving_base(KIND).location
        assert other not in folders
        folders.add(other)
    assert policy.serving_base(KIND, torch.bfloat16).location not in folders


# --- the index ---------------------------------------------------------------------------------


def copy_of_lab(folder):
    """The files of the lab's base in a folder of the test."""
    folder.mkdir()
    for file in lab.BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_known_base_is_found_without_a_hash_and_by_its_files_alone(cache, tmp_path):
    policy, index = (
        policy_of(model=str(copy_of_lab(tmp_path / "copy"))),
        cache.parent / "bases.json",
    )
    written = policy.serving_base(KIND).location
    before = written_state(index)
    assert policy.serving_base(KIND).location == written
    assert written_state(index) == before  # After a hash, the index is written again.
    os.utime(tmp_path / "copy" / "model.safetensors", (1000, 1000))
    assert policy.serving_base(KIND).about == f"{KIND} ({written}, reused)"
    assert written_state(index) != before
    known = json.loads(index.read_text())
    assert [entry["folder"] for entry in known.values()] == [Path(written).name] * 2


def test_other_weights_of_equal_size_and_time_are_another_base(tmp_path):
    copy = copy_of_lab(tmp_path / "copy")
    file = copy / "model.safetensors"
    os.utime(file, (1000, 1000))
    first = policy_of(model=str(copy))
    served = first.serving_base(KIND).location
    data = file.read_bytes()
    # Sixteen numbers of the last weight; in a new file, as the first policy maps the old one.
    (copy / "new").write_bytes(data[:-64] + bytes(byte ^ 0x01 for byte in data[-64:]))
    (copy / "new").rename(file)
    os.utime(file, (1000, 1000))
    second = policy_of(model=str(copy))
    other = second.serving_base(KIND).location
    assert other != served
    # The policy that has the old weights is still served with them.
    assert first.serving_base(KIND).location == served
    # So is one whose weights were changed after they had been loaded.
    with torch.no_grad():
        second.model.get_base_model().get_input_embeddings().weight[3, 5] += 1
    assert second.serving_base(KIND).location not in (served, other)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"KEY": 3}', '{"KEY": {"folder": "NAME"}}', "\0\xff",
             '{"KEY": {"folder": "../bases/NAME", "files": {}}}', '{"KEY": {"folder": "no"}}'],
)  # fmt: skip
def test_a_damaged_index_is_replaced(cache, text):
    policy, index = policy_of(), cache.parent / "bases.json"
    folder = Path(policy.serving_base(KIND).location)
    whole = json.loads(index.read_text())
    [key] = whole
    text = text.replace("KEY", key).replace("NAME", folder.name)
    index.write_text(text, encoding="latin-1")
    assert policy.serving_base(KIND).about == f"{KIND} ({folder}, reused)"
    assert json.loads(index.read_text()) == whole


# --- what is served, and damage ----------------------------------------------------------------


def test_a_base_without_quantisation_is_served_as_it_is(cache):
    policy = policy_of(quantization="none")
    assert policy.serving_base(KIND).about == "original"
    assert Path(policy.serving_base(KIND).location) == lab.BASE
    assert not cache.exists()


def _cut(folder):
    os.truncate(folder / "model.safetensors", 100_000)


def _less(folder):
    weights = load_file(folder / "model.safetensors")
    del weights[min(weights)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _edit(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 3.0}))


def _overwrite(folder):
    config = folder / "config.json"
    config.write_bytes(b" " * config.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [_cut, _less, _edit, _overwrite, lambda folder: (folder / "tokenizer.json").unlink(),
     lambda folder: (folder / "model.safetensors").unlink()],
    ids=["cut", "a tensor less", "edited", "of equal size", "no tokenizer", "no weights"],
)  # fmt: skip
def test_a_damaged_base_is_written_again(damage):
    policy = policy_of()
    folder = Path(policy.serving_base(KIND).location)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder)
    assert "written" in policy.serving_base(KIND).about
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_the_partial_folder_of_a_killed_process_is_not_used(cache):
    (cache / "partial").mkdir(parents=True)
    (cache / "partial" / "model.safetensors").write_bytes(b"half of it")
    policy = policy_of()
    folder = Path(policy.serving_base(KIND).location)
    assert load_file(folder / "model.safetensors")
    assert [f.name for f in cache.iterdir()] == [folder.name]


def test_runs_that_start_together_write_it_once(cache):
    policies = [policy_of() for _ in range(3)]
    with ThreadPool(3) as pool:
        served = pool.map(lambda policy: policy.serving_base(KIND).about, policies)
    assert sorted("written" in about for about in served) == [False, False, True]
    assert len(list(cache.iterdir())) == 1


def test_the_bases_used_last_are_kept_and_those_in_use(cache):
    kinds = [{"dtype": "float16"}, {}, {"dtype": "bfloat16"}, {"quantization": "int8"},
             {"double_quantization": False}]  # fmt: skip
    in_use = policy_of(**kinds[0])
    names = [Path(in_use.serving_base(KIND).location).name]
    for kind in kinds[1:4]:
        policy = policy_of(**kind)
        about = policy.serving_base(KIND).about
        names.append(Path(policy.serving_base(KIND).location).name)
        assert "removed" not in about
        del policy
        gc.collect()
    for age, name in enumerate(names):
        os.utime(cache / name, (1000 + age, 1000 + age))
    # The second is used again, so that the third is the oldest unused copy.
    policy = policy_of()
    policy.serving_base(KIND)
    del policy
    gc.collect()
    about = policy_of(**kinds[4]).serving_base(KIND).about
    assert f"; {names[2]} removed, 3 are kept" in about
    left = {folder.name for folder in cache.iterdir()}
    assert {names[0], names[1], names[3]} < left
    assert len(left) == 4


def test_a_large_base_is_written_in_parts(monkeypatch):
    policy = policy_of()
    whole = load_file(Path(policy.serving_base(KIND).location) / "model.safetensors")
    monkeypatch.setattr(serving, "SHARD", 300_000)
    monkeypatch.setenv("GFT_LITE_CACHE", os.environ["GFT_LITE_CACHE"] + "-parts")
    folder = Path(policy.serving_base(KIND).location)
    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    assert len(parts) > 3
    # The embedding alone has more.
    assert all(sum(t.nbytes for t in part.values()) <= 300_000 or len(part) == 1 for part in parts)
    together = {name: tensor for part in parts for name, tensor in part.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in whole.items())
    assert "reused" in policy.serving_base(KIND).about
    served = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(served.get_input_embeddings().weight, whole["model.embed_tokens.weight"])


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GFT_LITE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RecipeError, match=r"GFT_LITE_CACHE: must be a folder with room.*/file'"):
        policy_of().serving_base(KIND)


def test_a_full_disk_is_reported_and_leaves_no_base(cache):
    policy = policy_of()
    # A limit on the size of a file fails as a full disk does, without filling one.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(RecipeError, match="GFT_LITE_CACHE: must be a folder with room"):
            policy.serving_base(KIND)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "written" in policy.serving_base(KIND).about
    [folder] = cache.iterdir()
    assert str(folder) == policy.serving_base(KIND).location


def test_the_location_of_the_cache(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/large/cache")
    monkeypatch.setenv("GFT_LITE_CACHE", "~/mine")
    assert cache_folder() == Path("/home/someone/mine")
    monkeypatch.setenv("GFT_LITE_CACHE", "~no-such-user/mine")
    assert cache_folder() == Path("~no-such-user/mine")
    monkeypatch.delenv("GFT_LITE_CACHE")
    assert cache_folder() == Path("/large/cache/gft-lite")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/gft-lite")


# --- what vLLM serves --------------------------------------------------------------------------

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("vllm_bnb_plugin") is None or importlib.util.find_spec("vllm") is None,
    reason="needs vllm and vllm-bnb-plugin",
)


@needs_plugin
def test_the_trainers_numbers_are_nearest_then_the_plugins_then_the_published(tmp_path):
    from gft_lite.rollout.vllm_engine import VllmEngine

    policy = policy_of(dtype="bfloat16")
    policy.model.train()
    format = PromptFormat(policy.tokenizer, PromptSettings())
    pairs = [
        (format.prompt_ids(row["problem"]), format.response_ids(row["expert"][0])[0])
        for row in lab.rows("train", limit=16)
    ]
    gaps = {}
    for base in (KIND, "plugin", "original"):
        engine = VllmEngine(RolloutSettings(engine="vllm", base=base), policy, tmp_path)
        scores = [engine.score(*pair) for pair in pairs]
        engine.close()
        assert engine.base.startswith(base)
        gaps[base] = _mean_gap(policy, pairs, scores)
    assert 2 * gaps[KIND] < gaps["plugin"] < gaps["original"] / 2


@torch.no_grad()
def _mean_gap(policy, pairs, scores):
    """Nats between the trainer's log-probs of the tokens and an engine's."""
    gaps = []
    for (prompt, response), served in zip(pairs, scores, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        with torch.autocast("cpu", torch.bfloat16):
            logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        gaps += (logprobs - torch.tensor(served)).abs().tolist()
    return sum(gaps) / len(gaps)


def test_a_missing_plugin_is_an_error(monkeypatch):
    monkeypatch.setattr(vllm_shared, "entry_points", lambda **_: ())
    with pytest.raises(RecipeError, match=r"pip install --no-deps vllm-bnb-plugin==\d"):
        vllm_shared.engine_options(RolloutSettings(base="plugin"), policy_of(dtype="bfloat16"))


@needs_plugin
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "float32"}, r"rollout\.dtype: must be bfloat16 or float16.*got float32"),
        ({"dtype": "bfloat16", "quantization": "int8"}, r"policy\.quantization: must be nf4"),
        ({"dtype": "bfloat16", "double_quantization": False}, "got nf4 with False"),
    ],
)
def test_settings_that_the_plugin_does_not_support_are_errors(settings, words):
    rollout = RolloutSettings(base="plugin", dtype=settings["dtype"])
    with pytest.raises(RecipeError, match=words):
        vllm_shared.engine_options(rollout, policy_of(**settings))
