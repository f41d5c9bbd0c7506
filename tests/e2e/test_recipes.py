"""Every shipped recipe resolves and runs two steps on the tiny base; GSM8K with the real vLLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from rich.console import Console

from gft_lite import lab
from gft_lite.recipe import Recipe
from gft_lite.train import train

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(p.name for p in (ROOT / "recipes").glob("**/*.yaml"))
FRAGMENTS = sorted((ROOT / "configs").glob("*/*.yaml"))
QUIET = Console(quiet=True)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)
TINY = [
    "policy={model: lab, context: 1024, dtype: float32}", "train.steps=2",
    "train.problems_per_step=2", "data.holdout=2", "monitor={every: 1, problems: 2}",
    "eval.samples=1", "eval.k=[1]", "checkpoint.every=1",
]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_it_resolves(name):
    recipe = Recipe.load(f"recipes/{name}")
    assert recipe.name == name.removesuffix(".yaml")


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_fragment_can_be_extended(path, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: [{path}]\n")
    Recipe.load(recipe)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("lab")])
def test_the_lab_recipes_run(name, tmp_path):
    small = ["eval.sets.test.problems=2", "eval.sets.retention.problems=2", "data.problems=40"]
    # The lab recipes name their model themselves.
    run = train(Recipe.load(f"recipes/{name}", [*TINY[1:], *small]), tmp_path, console=QUIET)
    assert len(run.metrics()) == 2


@pytest.fixture
def math_rows(tmp_path):
    """The lab's problems in the columns that a data set with teachers has."""
    rows = [
        {"question": r["problem"], "gold": r["answer"],
         "expert": f"The final answer is $\\boxed{{{r['answer']}}}$.", "teacher": r["teacher"]}
        for r in lab.rows("train", limit=24)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "{problem: question, answer: gold, expert: expert, teacher: teacher}"
    return [f"data.source={file}", f"data.columns={columns}", "data.problems=20"]


def test_the_papers_experiment_runs_with_a_tiny_model(math_rows, tmp_path):
    overrides = [
        *TINY, *math_rows, "rollout.engine=transformers", "rollout.max_tokens=32",
    ]  # fmt: skip
    run = train(Recipe.load("recipes/qwen_math_1p5b.yaml", overrides), tmp_path / "run",
                console=QUIET)  # fmt: skip
    recipe = Recipe.load(run.path / "recipe.yaml")
    assert (recipe.objective.tau, recipe.group.size) == (0.7, 8)
    assert recipe.policy.quantization == "nf4"
    for metrics in run.metrics():
        assert metrics["trajectories"] == 16
        assert metrics["reward"]["expert"] == 1.0


@needs_vllm
def test_gsm8k_with_vllm_and_math_verify(shared_data, tmp_path):
    source = shared_data / "bench" / "gsm8k_train.jsonl"
    columns = "{problem: problem, answer: answer, answer_from: plain, expert: solution}"
    overrides = [f"data.source={source}", f"data.columns={columns}", "rollout.max_tokens=64"]
    run = train(Recipe.load("recipes/gsm8k_tiny.yaml", overrides), tmp_path / "run", console=QUIET)
    assert Recipe.load(run.path / "recipe.yaml").rollout.engine == "vllm"
    assert len(run.metrics()) == 3
    for metrics in run.metrics():
        assert metrics["sync_gap"] < 1e-4
        assert metrics["rollout_tokens"] > 0
    experts = [r for s in (1, 2, 3) for g in run.groups(s) for r in g["responses"]
               if r["source"] == "expert" and r["finish_reason"] == "stop"]  # fmt: skip
    assert all(r["reward"] == 1.0 for r in experts)


@needs_vllm
def test_the_lab_with_vllm_hot_loading_after_every_step(tmp_path):
    small = ["train.steps=5", "optim.lr=4e-3", "optim.warmup=0", "data.problems=60",
             "eval.sets.test.problems=2", "eval.sets.retention.problems=2",
             "rollout.engine=vllm"]  # fmt: skip
    run = train(Recipe.load("recipes/lab.yaml", [*TINY[2:], *small]), tmp_path, console=QUIET)
    metrics = run.metrics()
    assert max(m["sync_gap"] for m in metrics) < 1e-4
    assert metrics[-1]["kl"]["rollouts"]["reverse"] > 1e-3
    assert not run.scratch.exists()
