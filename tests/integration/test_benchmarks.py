"""Every benchmark at toy size: it runs, both sides do the same work, and what it counts is right.

Only what is counted is checked; times at this size say nothing.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from benchmarks import (
    against_trl,
    head,
    profile_step,
    recorded,
    rollout_cpu,
    scaling,
    sync,
    whole_step,
)
from benchmarks.recorded import Shape
from gft_lite.planning.model_shape import find_shape
from gft_lite.policy.registry import load_policy, model_location
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.errors import UserError

TOY = Shape(hidden=64, layers=1, ffn=128, vocab=300, mean=12, p95=30)
PROMPT = 20


@pytest.fixture(scope="module")
def pool():
    """One process for all jobs: it sets threads, kernels and environment as it likes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def cases(pool):
    return {case["flat_percent"]: case for case in against_trl.compare(TOY, [PROMPT], 1, pool)}


def test_lengths_are_log_normal_quantiles():
    lengths = Shape(groups=500).lengths()
    assert sum(lengths) / len(lengths) == pytest.approx(300, rel=0.01)
    assert sorted(lengths)[3800] == pytest.approx(900, rel=0.01)


def test_trl_pads_to_its_longest_response_and_runs_twice_unless_told_not_to(cases):
    lengths = TOY.lengths()
    padded = len(lengths) * (PROMPT + max(lengths)) / sum(lengths)
    shipped, tuned = (cases[0]["sides"][name] for name in ("trl", "trl_tuned"))
    assert shipped["forwarded_per_trained"] == shipped["old_logprobs_per_trained"] == padded
    assert tuned["forwarded_per_trained"] == padded
    assert tuned["old_logprobs_per_trained"] == 0
    assert cases[0]["sides"]["trl_by_group"]["forwarded_per_trained"] < padded


def test_ours_forwards_each_prompt_once_and_no_flat_group(cases):
    tokens = sum(TOY.lengths())
    full, flat = (cases[percent]["sides"]["gft_lite"] for percent in (0, 40))
    assert full["forwarded_per_trained"] == (5 * PROMPT + tokens) / tokens
    assert 0.5 < flat["forwarded_per_trained"] / full["forwarded_per_trained"] < 0.7
    assert full["old_logprobs_per_trained"] == 0
    small = cases[0]["sides"]["gft_lite_small_batches"]
    # Some groups fall into several micro-batches of two rows, and compute their prompt again.
    assert full["forwarded_per_trained"] < small["forwarded_per_trained"]
    assert cases[0]["flat_token_share"] == 0
    assert cases[40]["flat_token_share"] == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("percent", [0, 40])
@pytest.mark.parametrize(
    "side",
    ["trl", "trl_tuned", "gft_lite", "gft_lite_no_checkpointing", "gft_lite_small_batches"],
)
def test_gradients_are_the_reference_s(cases, percent, side):
    found = cases[percent]["sides"][side]["gradient"]
    assert found["cosine"] > 1 - 1e-6
    assert found["relative_gap"] < 1e-4


def test_a_real_models_folder_takes_the_place_of_the_random_one(tmp_path):
    shape = against_trl.real_shape(model_location("lab"), "reasoning")
    recorded.make_model(tmp_path, shape)
    assert (tmp_path / "config.json").resolve().parent == Path(model_location("lab")).resolve()
    assert recorded.plain_model(tmp_path).peft_config["default"].r == recorded.RANK
    assert len(shape.lengths()) == 16
    assert sum(shape.lengths()) / 16 == pytest.approx(300, rel=0.05)
    with pytest.raises(UserError, match=r"--model: must be smollm2 or the folder of a model"):
        against_trl.real_shape(str(tmp_path / "none"), "gsm8k")


def test_law_is_the_ratio_of_passes(cases):
    sides = cases[0]["sides"]
    ours, shipped = sides["gft_lite"], sides["trl"]
    law = 4 * shipped["forwarded_per_trained"] / (3 * ours["forwarded_per_trained"])
    assert ours["speed_ratio_law"] == pytest.approx(law)


def test_a_profile_accounts_for_all_seconds_by_pass_and_kind(pool, tmp_path):
    recorded.make_model(tmp_path, TOY)
    recorded.make_groups(tmp_path, TOY, PROMPT)
    pool.submit(recorded.make_reference, tmp_path, PROMPT).result()
    sides = ("gft_lite", "gft_lite_no_checkpointing")
    for label in sides:
        found = pool.submit(profile_step.profiled, label, tmp_path, PROMPT).result()
        parts = found["parts"]
        assert sum(sum(kinds.values()) for kinds in parts.values()) == pytest.approx(
            found["seconds"]
        )
        assert bool(parts["recomputation"]) == (label == "gft_lite")
        assert not parts["old"]
        kinds = {"products", "lora", "attention", "gathering", "elementwise"}
        assert kinds <= set(parts["forward"]) and kinds <= set(parts["backward"])
        assert "head" in parts["forward"]
        assert found["positions"] == 5 * PROMPT + sum(TOY.lengths())


def test_the_law_of_positions_with_the_cost_of_each_pass():
    def side(positions, **seconds):
        parts = {name: {"products": seconds.get(name, 0.0)} for name in profile_step.PASSES}
        return {"positions": positions, "seconds": sum(seconds.values()), "parts": parts}

    laws = profile_step.corrected_law(
        {
            "trl": side(100, old=1, forward=1, recomputation=1, backward=2, rest=1),
            "plain": side(50, forward=0.5, backward=1, rest=1),
        }
    )
    assert laws["trl"] == {"law": 1, "corrected_law": 1, "speed_ratio": 1}
    assert laws["plain"] == pytest.approx(
        {"law": 4, "corrected_law": 5 / 1.5, "speed_ratio": 6 / 2.5}
    )


def test_a_single_group_has_no_flat_case():
    assert against_trl.flat_cases(Shape(groups=1))["gft_lite"] == ("0",)
    assert "trl_by_group" not in against_trl.flat_cases(Shape(groups=1))
    assert against_trl.flat_cases(Shape())["trl"] == ("40",)


def test_heads_agree(pool):
    [size] = head.compare({300: 64}, 64, 1, pool)
    assert set(size["heads"]) == {"fused", "chunked", "full", "trl"}
    assert all(figures["relative_gap"] < 1e-5 for figures in size["heads"].values())


def test_sync_bytes(pool):
    pytest.importorskip("vllm")
    found = sync.compare(TOY, 1, pool)
    query, key = 64 * 64 + 64, 64 * 64 + 64  # one head of 64 each, with biases
    layer = query + 2 * key + 64 * 64 + 3 * 64 * 128 + 2 * 64
    adapter = 16 * (4 * (64 + 64) + 3 * (64 + 128))
    assert found["merge_and_push"]["bytes"] == 4 * (300 * 64 + layer + 64)
    assert 4 * adapter < found["hot_load"]["bytes"] < 4 * adapter + 4096
    small, *_, large = found["nf4_merge"]
    assert small["cosine"] < 0.1 < 0.5 < large["cosine"]


def test_counted_bytes_of_a_real_model():
    # Qwen2.5-1.5B has 1,543,714,304 parameters, 151,936 * 1536 of them in the tied embedding.
    found = sync.counted("Qwen/Qwen2.5-Math-1.5B")
    assert found["merge_and_push_bytes"] == 2 * 1_543_714_304
    assert found["hot_load_bytes"] == 2 * 18_464_768


def test_a_whole_step_samples_and_trains_every_token_on_both_sides(pool):
    size = whole_step.Size(problems=1, members=8, tokens=6)
    found = whole_step.compare("lab", size, ["gft_lite, transformers", "trl"], 1, pool)
    for side in found["sides"].values():
        seconds = dict(side["cpu_seconds"])
        assert seconds.pop("whole") == pytest.approx(sum(seconds.values()))
        assert min(seconds["rollout"], seconds["train"]) > 0
        assert side["trained_tokens_per_cpu_second"] == pytest.approx(
            48 / side["cpu_seconds"]["whole"]
        )
    ratio = found["sides"]["gft_lite, transformers"]["speed_ratio"]["whole"]
    whole = [side["cpu_seconds"]["whole"] for side in found["sides"].values()]
    assert ratio == pytest.approx(whole[1] / whole[0])


def test_the_limit_of_training_counts_each_prompt_once():
    size = whole_step.Size(problems=2, members=3, tokens=5)
    shape, prompts = find_shape("lab"), whole_step.prompt_tokens("lab", size)
    products = shape.linear_parameters * (prompts + 30) + shape.embedding_parameters * 30
    assert whole_step.training_limit("lab", size, 8e-9) == pytest.approx(products / 2)


def test_scaling_counts_and_plots(tmp_path):
    point = scaling.Point(members=2, response=8, prompt=16, vocab=300, hidden=64)
    found = scaling.sweep({"prompt": (16, 32)}, point, turns=1)
    per_trained = {
        prompt: [figures[layout]["forwarded_per_trained"] for layout in ("shared", "padded")]
        for prompt, figures in found["prompt"].items()
    }
    # Responses of 4 and 12 tokens: 16 + 16 once, or 2 * 28 padded; 16 are trained on.
    assert per_trained == {16: [2.0, 3.5], 32: [3.0, 5.5]}
    scaling.plot(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_the_limit_of_decoding_is_the_lower_of_rate_and_bandwidth():
    found = rollout_cpu.limit("lab")
    base = load_policy(PolicySettings(device="cpu", quantization="none")).model.get_base_model()
    linears = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    # With the output head, without the adapter.
    parameters = sum(m.weight.numel() for n, m in linears.items() if ".lora_" not in n)
    rate = found["gflops"] * 1e9 / (2 * parameters)
    bandwidth = 28 * found["gb_per_second"] * 1e9 / (2 * parameters)  # 28 rows a step, 2 bytes.
    assert found["tokens_per_cpu_second"] == pytest.approx(min(rate, bandwidth))
