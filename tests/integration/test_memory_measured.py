"""The memory plan against measured peaks: live storages at true width, and a process's RSS."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_check.meter import Meter
from benchmarks.gpu_check.work import seen_by_plan
from gft_lite.planning.memory import Choice, MemoryModel
from gft_lite.planning.model_shape import SHIPPED, find_shape
from gft_lite.policy import attention, lora, qlora
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.rollout.base import Request, Sampling
from gft_lite.rollout.transformers_engine import TransformersEngine
from gft_lite.utils.paths import PACKAGE

ROOT = Path(__file__).resolve().parents[2]


def rows_of(groups, prompt, responses, length):
    """Groups of responses to prompts that differ."""
    return [
        Row((3 + group, *range(4, 3 + prompt)), tuple(4 + i % 50 for i in range(length)), 1.0, 1e-3)
        for group in range(groups)
        for _ in range(responses)
    ]


def recomputing(layers):
    return Choice(0, layers, False, False, "transformers", 1)


def loss_of(batch):
    """A loss in all that the scores have: log-probs, and the KL to the reference."""

    def loss(scores, span):
        kl = 0 if scores.reference_kl is None else scores.reference_kl
        return (batch.weights[span] * (kl - scores.logprobs)).sum()

    return loss


# --- on the meta device ----------------------------------------------------------------------


def policy_on_meta(model, layers, checkpointed, monkeypatch):
    """The trainer's own policy in bf16 at a model's true width, without a byte of weights."""
    fields = json.loads((ROOT / SHIPPED / f"{model}.json").read_text())
    config = AutoConfig.for_model(**fields | {"num_hidden_layers": layers})
    settings = PolicySettings(layout="padded", gradient_checkpointing=checkpointed)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        adapted = qlora.add_adapter(base, settings, None, 0)
    qlora.checkpoint_layers(base, settings)
    tokenizer = type("Tokenizer", (), {"eos_token_id": 1, "pad_token_id": 0})
    policy = lora.LoraPolicy(adapted, tokenizer, settings, torch.bfloat16)
    # Trying layouts out, as a policy does when it is made, needs numbers.
    policy.layout = "shared"
    base.set_attn_implementation(attention.NAME)
    # Autocast has no meta device; the CPU's casts the same operations.
    monkeypatch.setattr(lora, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16))
    policy.model.train()
    return policy


@pytest.mark.parametrize(
    ("model", "checkpointed"),
    [
        ("Qwen/Qwen2.5-Math-7B", 0),
        ("Qwen/Qwen2.5-Math-7B", 1),
        ("Qwen/Qwen2.5-Math-7B", 3),
        ("meta-llama/Llama-3.1-8B", 0),
        ("meta-llama/Llama-3.1-8B", 3),
        ("deepseek-ai/deepseek-math-7b-base", 2),
        ("HuggingFaceTB/SmolLM3-3B", 1),
        ("Qwen/Qwen3-1.7B", 3),
        ("google/gemma-3-1b-it", 0),
        ("google/gemma-3-1b-it", 3),
        ("microsoft/Phi-4-mini-instruct", 0),
        ("microsoft/Phi-4-mini-instruct", 3),
    ],
)
def test_the_trunk_at_true_width(model, checkpointed, monkeypatch):
    policy = policy_on_meta(model, 3, checkpointed, monkeypatch)
    [batch] = policy.batches(rows_of(2, 512, 4, 512), 10**9)
    meter = Meter([*policy.model.parameters(), *policy.model.buffers()])
    with meter:
        hidden = policy._hidden(batch.to(policy.device))
        hidden.backward(torch.empty_like(hidden))
    memory = MemoryModel(replace(find_shape(model), layers=3), Recipe(), "cuda")
    choice, seen = recomputing(checkpointed), seen_by_plan(batch)
    candidates = memory.peak_candidates(choice, seen)
    trunk = max(sum(candidates[name].values()) for name in ("norm", "layer"))
    copies = memory.training(choice, seen)["lora"] - 4 * memory.lora_parameters
    gradients = 4 * memory.lora_parameters
    assert trunk + copies + gradients == pytest.approx(meter.peak, rel=0.01)


# --- on the CPU, with real numbers -----------------------------------------------------------


def save_model(folder, vocabulary, **sizes):
    """A random model with the lab's tokenizer, small beside its activations."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3} | sizes
    config = AutoConfig.for_model(
        "qwen2", num_attention_heads=8, num_key_value_heads=2, vocab_size=vocabulary,
        tie_word_embeddings=True, max_position_embeddings=4096, **sizes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PACKAGE / "lab" / "base" / name, folder)
    return folder


SHORT, LONG = (2, 64, 5, 96), (1, 640, 2, 640)  # Groups, prompt, responses, their length.


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    @cache
    def make(vocabulary):
        folder = tmp_path_factory.mktemp("model")
        # A large vocabulary costs less time at a small width.
        sizes = {"hidden_size": 64, "intermediate_size": 256} if vocabulary > 1000 else {}
        return save_model(folder, vocabulary, **sizes)

    return make


@pytest.mark.parametrize(
    ("vocabulary", "settings", "method", "rows"),
    [
        (32_000, {"gradient_checkpointing": 3}, "gft", SHORT),
        (32_000, {"gradient_checkpointing": 3, "fused_head": False}, "gft", SHORT),
        (32_000, {"gradient_checkpointing": 3}, "asft", SHORT),
        (1000, {"gradient_checkpointing": 2}, "gft", SHORT),
        (1000, {"gradient_checkpointing": 0}, "gft", LONG),
        (1000, {"gradient_checkpointing": 3, "dtype": "bfloat16"}, "gft", SHORT),
        (1000, {"gradient_checkpointing": 0, "layout": "packed"}, "gft", SHORT),
        (1000, {"gradient_checkpointing": 0, "layout": "padded"}, "gft", SHORT),
        (1000, {"gradient_checkpointing": 0, "lora": {"dropout": 0.1}}, "gft", SHORT),
    ],
    ids=str,
)
def test_a_micro_batch_with_its_head(vocabulary, settings, method, rows, random_model):
    folder = str(random_model(vocabulary))
    recipe = Recipe.from_tree({"method": method, "policy": {"model": folder} | settings})
    policy = load_policy(recipe.policy)
    policy.model.train()
    [batch] = policy.batches(rows_of(*rows), 10**9)
    meter = Meter([*policy.model.parameters(), *policy.model.buffers(), batch.input_ids])
    with meter:
        policy.backward(batch, loss_of(batch), reference_kl=method == "asft")
    model = MemoryModel(find_shape(folder), recipe, "cpu")
    choice = recomputing(recipe.policy.gradient_checkpointing)
    training = model.training(choice, seen_by_plan(batch))
    beside = ("lora", "checkpoints", "activations", "head")
    masters, gradients = 4 * model.lora_parameters, 4 * model.lora_parameters
    predicted = sum(training[name] for name in beside) - masters + gradients
    assert predicted == pytest.approx(meter.peak, rel=0.04)


def test_the_base_and_the_adapter(random_model):
    """NF4 with double quantisation in fp32: every tensor that the loaded policy holds."""
    folder = str(random_model(1000))
    recipe = Recipe.from_tree({"policy": {"model": folder}})
    policy = load_policy(recipe.policy)
    held = {}
    for parameter in policy.model.parameters():
        state = getattr(parameter, "quant_state", None)
        scales = [state.absmax, state.state2.absmax] if state else []
        held |= {t.data_ptr(): t.nbytes for t in (parameter.data, *scales)}
    model = MemoryModel(find_shape(folder), recipe, "cpu")
    assert model.base(False) + 4 * model.lora_parameters == pytest.approx(
        sum(held.values()), rel=1e-3
    )


@pytest.mark.parametrize(
    ("vocabulary", "prompt", "length", "rows"),
    [(1000, 256, 4, 4), (32_000, 8, 3, 32), (1000, 8, 48, 32)],
    ids=["prompts", "drawing", "cache"],
)
def test_a_rollout_with_the_trainers_model(vocabulary, prompt, length, rows, random_model):
    folder = str(random_model(vocabulary))
    recipe = Recipe.from_tree(
        {
            "policy": {"model": folder},
            "rollout": {"max_tokens": length, "batch_size": rows},
            "data": {"max_prompt_tokens": prompt},
        }
    )
    policy = load_policy(recipe.policy)
    policy.eos_ids = frozenset()  # No response ends early.
    engine = TransformersEngine(recipe.rollout, policy, Path())
    engine.sync(Path(), 1)
    meter = Meter([*policy.model.parameters(), *policy.model.buffers()])
    with meter:
        request = Request(tuple(range(3, 3 + prompt)), tuple(range(rows)))
        engine.generate([request], Sampling(max_tokens=length))
    choice = replace(recomputing(0), batch_size=rows)
    taken = MemoryModel(find_shape(folder), recipe, "cpu").engine(choice)
    assert sum(taken.values()) == pytest.approx(meter.peak, rel=0.05)


def test_the_resident_memory_of_a_process(tmp_path):
    save_model(tmp_path, 4000, hidden_size=512, intermediate_size=2048, num_hidden_layers=2)
    # glibc would keep freed blocks of up to 32 MiB for later; so it returns each at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] > 100 << 20
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.03)


def train_a_micro_batch(folder):
    """Predicted and measured growth of this process's resident memory in one micro-batch."""
    torch.set_num_threads(1)
    recipe = Recipe.from_tree({"policy": {"model": folder, "gradient_checkpointing": False}})
    policy = load_policy(recipe.policy)
    policy.model.train()
    measured = []
    for rows in (rows_of(1, 8, 2, 8), *[rows_of(1, 128, 8, 128)] * 4):  # The first one warms up.
        [batch] = policy.batches(rows, 10**9)
        Path("/proc/self/clear_refs").write_text("5")  # The peak starts from here.
        resting = _of_status("VmRSS")
        policy.backward(batch, loss_of(batch))
        measured.append(_of_status("VmHWM") - resting)
    moments = MemoryModel(find_shape(folder), recipe, "cpu").peak_candidates(
        recomputing(0), seen_by_plan(batch)
    )
    predicted = max(sum(parts.values()) for parts in moments.values())
    # The kernel may take pages of libraries away meanwhile, which hides as much growth.
    print(json.dumps({"predicted": predicted, "measured": max(measured[1:])}))


def _of_status(name):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    train_a_micro_batch(sys.argv[1])
