"""`optim.lr: auto` and the range test's conclusions, by hand-computed values; LoRA options."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gft_lite.cli import main
from gft_lite.planning.learning_rate import automatic_rate
from gft_lite.recipe.lora_section import LoraSettings
from gft_lite.recipe.schema import Recipe
from gft_lite.training.optim import settle_rate
from gft_lite.training.rate_range import Point, conclude, divergence
from gft_lite.utils.errors import RecipeError


def recipe(method="sft", **lora):
    optim = {"lr": "auto"}
    return Recipe.from_tree({"method": method, "policy": {"lora": lora}, "optim": optim})


@pytest.mark.parametrize(
    ("width", "advantages", "lora", "rate"),
    [
        (2000, False, {}, 5e-4),
        (2000, True, {}, 2.5e-4),
        (2000, False, {"rank": 128}, 5e-4),  # The same for every rank.
        (2000, False, {"alpha": 64}, 2.5e-4),
        (2000, False, {"rank": 4, "use_rslora": True}, 2.5e-4),  # sqrt(4) times the scale.
        (128, False, {}, 4.3e-3),  # 15.625 ** 0.781 = 8.56; tuned on the lab: 4e-3.
        (4096, False, {}, 2.9e-4),
    ],
)
def test_the_rate_of_the_rule(width, advantages, lora, rate):
    found = automatic_rate(recipe(**lora), width, group_advantages=advantages)
    assert found == pytest.approx(rate, rel=1e-9)


def test_a_dry_run_shows_the_rate(capsys):
    assert main(["train", "recipes/lab.yaml", "optim.lr=auto", "--dry-run"]) == 0
    assert "\n  lr: 0.0021\n" in capsys.readouterr().out


def test_a_run_has_and_prints_the_rate():
    log = StringIO()
    lab = Recipe.load("recipes/lab.yaml", ["optim.lr=auto"])
    assert settle_rate(lab, Console(file=log, width=200)).optim.lr == 0.0021
    assert log.getvalue().startswith("optim.lr: 0.0021, by the rule for a width of 128, halved")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"optim": {"lr": "auto"}, "stages": ["sft", "gft"]},
         "optim.lr: must be a number with stages, each with a rate of its own, got"),
        ({"optim": {"lr": "auto"}, "policy": {"lora": {"init": "pissa"}}},
         "optim.lr: must be a number with policy.lora.init pissa, got"),
        ({"optim": {"lr": "auto", "lora_plus_ratio": 4}},
         "optim.lr: must be a number with optim.lora_plus_ratio, got"),
        ({"optim": {"lr": "automatic"}}, "optim.lr: must be 'auto'"),
        ({"optim": {"lora_plus_ratio": 0.5}}, "optim.lora_plus_ratio: must be "),
        ({"optim": {"weight_decay": 0.1}, "policy": {"lora": {"init": "olora"}}},
         "optim.weight_decay: must be 0 with policy.lora.init olora, whose factors are the"),
        ({"policy": {"lora": {"use_dora": True}}, "rollout": {"engine": "vllm"}},
         "policy.lora.use_dora: must be false unless rollout.engine is transformers, as vLLM"),
        ({"policy": {"lora": {"init": "loftq"}}},
         "policy.lora.init: must be default, pissa or olora; loftq corrects the quantised base"),
        ({"policy": {"lora": {"init": "eva"}}}, "policy.lora.init: must be "),
        ({"policy": {"lora": {"use_dora": True, "init": "pissa"}},
          "rollout": {"engine": "transformers"}},
         "policy.lora.init: must be default with policy.lora.use_dora"),
        ({"policy": {"lora": {"rank_pattern": {"q_(proj": 4}}}},
         "policy.lora.rank_pattern: must have regular expressions as keys, not 'q_(proj'"),
        ({"policy": {"lora": {"rank_pattern": {"q_proj": 0}}}}, "policy.lora.rank_pattern.q_proj:"),
        ({"policy": {"lora": {"layers_to_transform": []}}}, "policy.lora.layers_to_transform:"),
        ({"policy": {"backend": "unsloth", "lora": {"exclude_modules": "k_proj"}}},
         "policy.lora.exclude_modules: must be left out with backend unsloth"),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other(overrides, text):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree(overrides)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(text)


def test_a_stage_must_have_a_number_too():
    tree = {"stages": [{"method": "sft", "overrides": {"optim": {"lr": "auto"}}}]}
    with pytest.raises(RecipeError, match=r"optim.lr: must be a number in a stage, got auto"):
        Recipe.from_tree(tree).stage(0)


def test_ranks_by_pattern_selection_and_start():
    lora = LoraSettings(
        rank=4, alpha=8, rank_pattern={"q_proj": 2, r"layers\.1\..*": 6}, init="pissa",
        exclude_modules=["mlp.up_proj"], layers_to_transform=[0, 1],
    )  # fmt: skip
    paths = ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj",
             "layers.1.mlp.up_proj", "layers.10.self_attn.q_proj")  # fmt: skip
    assert [lora.rank_of(f"model.{path}") for path in paths] == [2, 2, 6, 0, 0]
    # Twice the rank and alpha, so that alpha / rank stays; with rslora alpha / sqrt(rank).
    trained = lora.trained
    assert (trained.rank, trained.alpha, trained.largest_rank, trained.init) == (
        8,
        16,
        12,
        "default",
    )
    stable = LoraSettings(rank=4, alpha=8, init="olora", use_rslora=True).trained
    assert stable.alpha / math.sqrt(stable.rank) == pytest.approx(8 / math.sqrt(4))


# --- the range test ----------------------------------------------------------------------------


def points(values, figure):
    """A rate of 2 ** step with these values."""
    empty = {"loss": 0.1, "reward": None, "grad_norm": 1.0, "kl": 0.0}
    return [Point(2.0**i, **{**empty, figure: value}) for i, value in enumerate(values)]


def test_the_advice_is_a_third_of_the_rate_with_the_best_mean():
    losses = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.4, 2.0, 9.0]
    found = conclude(points(losses, "loss"), "loss", "")
    # The means of five are lowest in the middle of 0.4, 0.2, 0.2, 0.2, 0.4: step 10.
    assert (found.best, found.rate) == (10, pytest.approx(2**10 / 3, rel=0.02))
    rewards = [1 - loss for loss in losses[:13]]
    assert conclude(points(rewards, "reward"), "reward", "").best == 10


def test_no_advice_within_the_noise_or_without_figures():
    flat = conclude(points([0.2, 0.3] * 8, "reward"), "reward", "")
    assert (flat.best, flat.rate) == (None, None)
    assert "within its noise" in flat.reason
    few = conclude(points([0.2] * 5 + [None] * 9, "reward"), "reward", "")
    assert few.reason == "only 5 of 14 steps have a reward of own samples"


def test_divergence_is_what_ends_it():
    losses = [1.0] * 10
    assert divergence(points([*losses, 1.9], "loss"), by_reward=False) is None
    assert "the loss has risen from 1 to 2.1" in str(
        divergence(points([*losses, 2.1], "loss"), by_reward=False)
    )
    rewards = [0.4] * 8
    assert divergence(points([*rewards, 0.1, 0.1, 0.1], "reward"), by_reward=True) is None
    assert "fallen from 0.40 to 0.16" in str(
        divergence(points([*rewards, 0.1, 0.1, 0.1, 0.1], "reward"), by_reward=True)
    )
    assert "3.5 nats" in str(divergence([Point(1.0, 0.1, None, 1.0, 3.5)], by_reward=True))
    broken = Point(1.0, None, None, None, 0.0, finite=False)
    assert "not finite" in str(divergence([broken], by_reward=True))
    lost = Point(1.0, 0.1, None, 1.0, math.nan)
    assert "nan nats" in str(divergence([lost], by_reward=True))


def test_a_range_test_of_the_lab_stops_where_training_diverges(tmp_path, capsys, monkeypatch):
    """At rates far too high, after a step or two; nothing is left but what it reports."""
    shipped, folder = str(Path("recipes/lab.yaml").resolve()), tmp_path / "range"
    monkeypatch.chdir(tmp_path)
    small = ["policy.quantization=none", "rollout.engine=transformers",
             "train.problems_per_step=2", "monitor.problems=2", "group={expert: 1, teacher: 0, "
             "self: 1}", "data.problems=40", "data.holdout=2"]  # fmt: skip
    assert main(["train", shipped, *small, "--lr-range", "0.5:5", "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "training diverged at " in out
    assert "no advice: only " in out
    found = json.loads((folder / "lr-range.json").read_text())
    assert found["points"][0]["rate"] == 0.5
    assert found["points"][-1]["kl"] > 3
    assert sorted(path.name for path in folder.iterdir()) == [
        "lr-range.json", "lr-range.md", "lr-range.png", "lr-range.svg",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["range"]


def test_a_range_must_be_two_rates_and_no_run_to_continue(capsys):
    for arguments in (["--lr-range", "1e-3:1e-4"], ["--lr-range", "--resume"]):
        assert main(["train", "recipes/lab.yaml", *arguments]) == 2
        assert capsys.readouterr().err.startswith("--lr-range: must be ")
