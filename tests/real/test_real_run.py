"""A real model on the command line: train, kill and resume, evaluate, merge, serve.

`GFT_LITE_REAL_MODEL=DIR` runs these tests on another chat model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gft_lite.cli import main
from gft_lite.rollout.vllm_launcher import free_port
from gft_lite.runs.folder import RunFolder

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason='needs vllm: pip install "gft-lite[vllm]"'
    ),
    pytest.mark.usefixtures("one_thread"),
]

ROWS = 6
BOXED = "{problem} Put the result in \\boxed{}."
RECIPE = {
    "method": "gft",
    "group": {"expert": 1, "teacher": 0, "self": 2},
    "reward": {"functions": ["math"]},
    "rollout": {"engine": "vllm", "dtype": "float32", "max_tokens": 64, "batch_size": 8},
    "optim": {"lr": 1e-4, "warmup": 0},
    "train": {"steps": 2, "problems_per_step": 1, "micro_batch_tokens": 256},
    "eval": {"samples": 1, "k": [1], "max_tokens": 24},
    "monitor": {"every": 1, "problems": 1},
    "checkpoint": {"every": 1, "keep": 2},
}
# In the second step, when its samples and its update are made and its checkpoint is not.
KILLED = {"at": "gft_lite.rollout.vllm_engine:VllmEngine.sync", "acts": {"1": "keep_copy"},
          "step": 2, "matching": ""}  # fmt: skip
TOKENS = 12  # Of each answer in the evaluation.
QUESTION = "What is the capital of France? Answer in one word."
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(real_model, rows, tmp_path_factory):
    """A run, and the run resumed from what a kill in its second step leaves, with their output."""
    folder = tmp_path_factory.mktemp("real")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:ROWS]))
    columns = {"problem": "problem", "answer": "answer", "expert": "solution"}
    prompt = {"style": "chat", "template": BOXED}
    policy = {"model": str(real_model), "dtype": "float32", "context": 512, "threads": 1}
    recipe = folder / "real.yaml"
    recipe.write_text(json.dumps(RECIPE | {  # JSON is YAML.
        "policy": policy,
        "data": {"source": str(data), "columns": columns, "prompt": prompt, "holdout": 1,
                 "max_prompt_tokens": 160},
    }))  # fmt: skip
    command = ["train", str(recipe), "--out", str(folder / "run")]
    resumed = [*command[:-1], str(folder / "run-killed"), "--resume"]
    attempts = [(command, [KILLED]), (resumed, [])]
    job = {"name": "run", "folder": str(folder / "run"), "attempts": attempts}
    (folder / "plan.json").write_text(json.dumps({"whole": [job], "others": []}))
    script = Path(__file__).parents[1] / "e2e" / "crash_runs.py"
    subprocess.run([sys.executable, script, folder / "plan.json"], check=True, timeout=3600)
    codes = [int((folder / f"run.{i}.code").read_text()) for i in range(2)]
    outputs = [(folder / f"run.{i}.txt").read_text(encoding="utf-8") for i in range(2)]
    assert codes == [0, 0], "\n".join(outputs)
    return SimpleNamespace(
        whole=RunFolder(folder / "run"), resumed=RunFolder(folder / "run-killed"), outputs=outputs
    )


@pytest.fixture(scope="module")
def run(runs) -> RunFolder:
    return runs.whole


def load(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(real_model):
    return AutoTokenizer.from_pretrained(real_model)


@pytest.fixture(scope="module")
def peft_model(real_model, run):
    """The published model with the run's adapter, loaded by peft alone."""
    return PeftModel.from_pretrained(load(real_model), run.adapter).eval()


@torch.no_grad()
def greedy(model, tokenizer, question, tokens):
    """The ids of the answer to a chat message, by transformers alone."""
    message = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": tokens}
    return model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


def test_two_steps_of_gft(run):
    metrics = run.metrics()
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert m["sources"] == {"expert": 1, "self": 2}
        assert m["reward"]["expert"] == 1.0  # By math-verify.
        assert m["trained_tokens"] == m["tokens"] > 0
        assert m["grad_norm"] > 0 and m["sync_gap"] < 1e-3
    moved = [tensor.abs().max() for name, tensor in load_file(run.adapter / WEIGHTS).items()
             if "lora_B" in name]  # fmt: skip
    assert moved and all(change > 0 for change in moved)
    assert metrics[-1]["kl"]["held_out"]["forward"] > 0


def test_resumed_from_what_a_kill_leaves(runs, run):
    resumed = runs.resumed
    first, second = zip(*(log(r) for r in (resumed, run)), strict=True)
    assert first[0] == first[1] and second[0] != second[1]  # Its seconds: only step 2 ran again.
    assert comparable(resumed) == comparable(run)
    ours, theirs = load_file(resumed.adapter / WEIGHTS), load_file(run.adapter / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def log(run):
    """The lines of the log as text."""
    return (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def comparable(run):
    """Metrics, groups and results of a run, without times and memory."""
    metrics = [{k: v for k, v in m.items() if k not in ("seconds", "peak_memory")}
               for m in run.metrics()]  # fmt: skip
    summary = run.summary()
    return metrics, [run.groups(1), run.groups(2)], summary["base"], summary["trained"]


def test_the_plan_is_near_the_measured_peak(runs):
    planned, measured = map(float, re.search(
        r"memory: ([\d.]+) GiB planned at most, ([\d.]+) GiB measured", runs.outputs[0]).groups()
    )  # fmt: skip
    assert planned == pytest.approx(measured, rel=0.15)


def test_evaluation_samples_what_transformers_and_peft_generate(
    run, real_model, rows, tokenizer, peft_model, tmp_path
):
    benchmark = {"title": "GSM8K", "source": "openai/gsm8k", "prompt": {
        "style": "chat", "template": BOXED}}  # fmt: skip
    suite = {"definitions": {"gsm8k": benchmark}, "samples": 1, "drift": 0,
             "rollout": {"temperature": 0, "max_tokens": TOKENS, "engine": "transformers"},
             "policy": {"quantization": "none", "dtype": "float32", "threads": 1}}  # fmt: skip
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    fields = ("id", "problem", "answer", "answer_type")
    asked = [{name: row[name] for name in fields} for row in rows[ROWS : ROWS + 1] or rows[:1]]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    out = tmp_path / "out"
    assert main(["eval", str(run.path), str(real_model), "--suite", str(tmp_path / "suite.yaml"),
                 "--data-dir", str(tmp_path), "--out", str(out)]) == 0  # fmt: skip
    targets = json.loads((out / "results.json").read_text())["targets"]
    for label, base in ((str(run.path), False), (str(real_model), True)):
        [file] = (out / "responses").glob(f"{targets[label]['identity']}/*.jsonl")
        texts = {e["text"] for e in map(json.loads, file.read_text().splitlines())}
        expected = set()
        for row in asked:
            question = BOXED.replace("{problem}", row["problem"])
            if base:
                with peft_model.disable_adapter():
                    ids = greedy(peft_model, tokenizer, question, TOKENS)
            else:
                ids = greedy(peft_model, tokenizer, question, TOKENS)
            expected.add(tokenizer.decode(ids, skip_special_tokens=True))
        assert texts == expected


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    assert main(["merge", str(run.path), "--out", str(folder), "--dtype", "float32"]) == 0
    return folder


@torch.no_grad()
def test_transformers_loads_the_merged_model_and_peft_the_adapter(
    run, real_model, merged, tokenizer, peft_model
):
    response = run.groups(2)[0]["responses"][-1]["token_ids"]
    ids = torch.tensor([response])
    plain = load(merged)
    ours, theirs = (m(input_ids=ids).logits.log_softmax(-1) for m in (plain, peft_model))
    with peft_model.disable_adapter():
        base = peft_model(input_ids=ids).logits.log_softmax(-1)
    gap, change = (ours - theirs).abs().mean(), (ours - base).abs().mean()
    assert gap < 1e-4 < change
    own = AutoTokenizer.from_pretrained(merged)
    assert own.get_vocab() == tokenizer.get_vocab()
    answer = greedy(plain, own, QUESTION, 64)
    assert answer == greedy(peft_model, tokenizer, QUESTION, 64)
    assert answer[-1] in ends(plain) and "Paris" in own.decode(answer)


def ends(model):
    """The tokens that end an answer of the model."""
    found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found]


def test_a_vllm_server_serves_the_adapter(run, real_model, tokenizer, peft_model, tmp_path):
    expected = greedy(peft_model, tokenizer, QUESTION, 64)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"gft={run.adapter}"]
    process, url, log = serve(tmp_path / "log.txt", real_model, *lora)
    try:
        body = {"model": "gft", "messages": [{"role": "user", "content": QUESTION}],
                "temperature": 0, "max_tokens": 64}  # fmt: skip
        [choice] = ask(process, f"{url}/v1/chat/completions", body, log)["choices"]
        assert choice["message"]["content"] == text
        assert choice["finish_reason"] == "stop"
    finally:
        process.terminate()
        process.wait(600)


def serve(log, model, *options):
    """Start what `vllm serve MODEL` starts; returns its process, its address and its log."""
    port = free_port()
    # Not the command itself: it reads the metadata of a package that a CPU build is not named by.
    command = [
        sys.executable,
        "-P",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--kv-cache-memory-bytes",
        str(64 << 20),
        *options,
    ]
    environment = os.environ | {
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=output, stderr=output
        )
    return process, f"http://127.0.0.1:{port}", log


def ask(process, url, body, log):
    """The server's answer, once it listens."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    while process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())
