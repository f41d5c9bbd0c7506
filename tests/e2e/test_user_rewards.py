"""`gft-lite train` and `eval` with users' reward functions: errors, None, graded scores."""

from __future__ import annotations

import json

import pytest

from gft_lite.cli import main

SMALL = [
    "train.steps=1", "train.problems_per_step=2", "data.problems=20", "data.holdout=0",
    "group={expert: 1, teacher: 0, self: 3}", "monitor.every=0", "eval.samples=2", "eval.k=[1]",
    "eval.sets.test.problems=3", "eval.sets.retention.problems=3", "policy.quantization=none",
]  # fmt: skip

FUNCTIONS = """
import sys

def exits(completions, **columns): sys.exit(0)
def interrupts(completions, **columns): raise KeyboardInterrupt
def huge(completions, **columns): return [1e308] * len(completions)
def engine(*_): sys.exit(0)
def late(completions, **columns):
    yield 1.0
    sys.exit(0)
def unsure(completions, **columns):
    return [None if i % 2 else 1.0 for i in range(len(completions))]
def never_in_training(completions, id, **columns):
    return [None if i.startswith("lab-train") else 1.0 for i in id]
def graded(completions, **columns): return [0.6 + 0.4 / (1 + len(c)) for c in completions]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_e2e.py").write_text(FUNCTIONS, encoding="utf-8")
    (tmp_path / "exiting_e2e.py").write_text("raise SystemExit(0)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def train(folder, *overrides):
    return main(["train", "recipes/lab.yaml", *SMALL, *overrides, "--out", str(folder)])


def test_an_engine_that_ends_the_program_is_a_failure(module, capsys):
    assert train(module / "run", "rollout.engine=my_rewards_e2e:engine") == 1
    assert "SystemExit: 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("my_rewards_e2e:exits", "must not raise, got SystemExit: 0."),
        ("my_rewards_e2e:interrupts", "must not raise, got KeyboardInterrupt."),
        ("my_rewards_e2e:late", "must not raise, got SystemExit: 0."),
        ("my_rewards_e2e:huge", "must be at most 1e+15 in magnitude, got 1e+308."),
        ("exiting_e2e:f", "importing exiting_e2e must not fail, got SystemExit: 0."),
    ],
)
def test_a_reward_function_that_ends_the_program_is_a_user_error(module, capsys, name, error):
    assert train(module / "run", f"reward.functions=[{name}]") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"reward '{name}': ")
    assert error in message
    assert not (module / "run" / "summary.json").exists()


def test_a_warning_where_no_function_applies_to_any_response(module, capsys):
    rules = "[my_rewards_e2e:never_in_training]"
    assert train(module / "run", f"reward.functions={rules}") == 0
    captured = capsys.readouterr()
    output = " ".join((captured.out + captured.err).split())
    assert "no reward function applied to any of the 8 responses" in output


def test_a_response_without_a_reward_is_not_trained_on(module):
    assert train(module / "run", "reward.functions=[my_rewards_e2e:unsure]") == 0
    for line in (module / "run" / "groups" / "step-000001.jsonl").read_text().splitlines():
        responses = json.loads(line)["responses"]
        assert [r["reward"] for r in responses] == [1.0, None, 1.0, None]
        assert [r["verdict"] for r in responses] == ["ok", "not_applicable"] * 2
        assert [r["advantage"] for r in responses] == [0.0] * 4


def test_a_graded_reward_is_reported_as_mean_reward_and_not_as_accuracy(module):
    assert train(module / "run", "reward.functions=[my_rewards_e2e:graded]") == 0
    summary = json.loads((module / "run" / "summary.json").read_text())
    for model in ("base", "trained"):
        assert set(summary[model]) == {"mean_reward", "retention", "kl"}
        assert 0.6 < summary[model]["mean_reward"] < 1.0
    assert main(["report", str(module / "run"), "--out", str(module / "report.html")]) == 0
    page = (module / "report.html").read_text(encoding="utf-8")
    assert "test, mean reward" in page
    assert "pass@1" not in page.split('<section id="recipes">')[0]


def test_correctness_comes_from_the_rule_that_compares_the_answer(module):
    rules = "[my_rewards_e2e:graded, {name: exact, parameters: {marker: '#'}}]"
    assert train(module / "run", f"reward.functions={rules}") == 0
    base = json.loads((module / "run" / "eval" / "base.json").read_text())
    assert base["test"]["pass@1"] == sum(base["test"]["correct"].values()) / 6 < 1
