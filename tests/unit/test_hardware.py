"""The hardware fragments: which of the paper's models the plan fits on which card, and why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gft_lite.planning.gpus import parse_size
from gft_lite.planning.memory import MemoryModel
from gft_lite.planning.model_shape import find_shape
from gft_lite.planning.planner import choose
from gft_lite.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
FRAGMENTS = ROOT / "configs" / "hardware"
CARDS = {
    "laptop_8gb": "8GiB", "rtx4070_12gb": "rtx4070", "rtx4080_16gb": "rtx4080",
    "rtx4090_24gb": "rtx4090", "a100_80gb": "a100", "h200": "h200",
}  # fmt: skip
QWEN_1B, LLAMA_3B, DEEPSEEK, QWEN_7B, LLAMA_8B = MODELS = (
    "qwen2.5-math-1.5b", "llama-3.2-3b", "deepseek-math-7b", "qwen2.5-math-7b", "llama-3.1-8b",
)  # fmt: skip


# Where vLLM does not fit as it is: the GiB of cache that one sequence needs and vLLM has not left,
# the rows that the trainer's own model samples at a time, and whether vLLM fits with its plugin.
SLOW = {
    ("laptop_8gb", LLAMA_3B): (0.9, 8, True),
    ("laptop_8gb", DEEPSEEK): (1.9, 1, False),
    ("laptop_8gb", QWEN_7B): (0.2, 8, False),
    ("laptop_8gb", LLAMA_8B): (1.0, 4, False),
    ("rtx4070_12gb", DEEPSEEK): (1.9, 2, False),
    ("rtx4070_12gb", QWEN_7B): (0.2, 16, False),
    ("rtx4070_12gb", LLAMA_8B): (1.0, 8, False),
    ("rtx4080_16gb", DEEPSEEK): (1.9, 4, True),
    ("rtx4080_16gb", QWEN_7B): (0.2, 32, True),
    ("rtx4080_16gb", LLAMA_8B): (1.0, 16, True),
}
NAMES = {
    QWEN_1B: "Qwen2.5-Math-1.5B", LLAMA_3B: "Llama-3.2-3B", DEEPSEEK: "DeepSeekMath-7B",
    QWEN_7B: "Qwen2.5-Math-7B", LLAMA_8B: "Llama-3.1-8B",
}  # fmt: skip
PAIRS = [(card, model) for card in CARDS for model in MODELS]


@pytest.fixture
def plan(tmp_path):
    """The plan for the paper's GFT on a model, on a card with its fragment and overrides."""

    def make(card, model, *overrides):
        bases = (ROOT / "recipes" / "paper" / model / "gft.yaml", FRAGMENTS / f"{card}.yaml")
        file = tmp_path / "recipe.yaml"
        file.write_text(f"extends: [{', '.join(map(str, bases))}]\n")
        recipe = Recipe.load(file, overrides)
        model = MemoryModel(find_shape(recipe.policy.model), recipe, "cuda")
        return choose(model, parse_size(CARDS[card]))

    return make


def test_every_fragment_is_here():
    assert {file.stem for file in FRAGMENTS.glob("*.yaml")} == set(CARDS)


@pytest.mark.parametrize(("card", "model"), PAIRS)
def test_every_model_fits_in_one_way(plan, card, model):
    found = plan(card, model)
    assert found.problems == ()
    assert found.peak <= found.limit
    if (card, model) not in SLOW:
        assert found.choice.engine == "vllm"
        return
    _, rows, _ = SLOW[card, model]
    assert (found.choice.engine, found.choice.batch_size) == ("transformers", rows)
    # The largest power of two.
    assert plan(card, model, f"rollout.batch_size={2 * rows}").problems


@pytest.mark.parametrize(("card", "model"), SLOW)
def test_why_vllm_does_not_fit_and_when_it_does(plan, card, model):
    one_sequence, _, with_plugin = SLOW[card, model]
    assert plan(card, model, "rollout.engine=vllm").problems == (
        "engine, vllm, has 0.0 GiB left for the KV cache, "
        f"and one sequence needs {one_sequence} GiB",
    )
    found = plan(card, model, "rollout.engine=vllm", "rollout.base=plugin")
    assert (not found.problems) == with_plugin


@pytest.mark.parametrize("card", CARDS)
def test_the_comment_says_what_is_tested_here(card):
    text = (FRAGMENTS / f"{card}.yaml").read_text()
    comment = " ".join(line.strip("# ") for line in text.splitlines() if line[0] == "#")
    listed = {(name, int(rows)) for name, rows in re.findall(r"(\S+B) (\d+)\b", comment)}
    assert listed == {(NAMES[m], rows) for (own, m), (_, rows, _) in SLOW.items() if own == card}
    plugin = any(fits for (own, _), (_, _, fits) in SLOW.items() if own == card)
    assert ("rollout.base=plugin" in comment) == plugin
