"""`rollout.stop` in a run and in an evaluation: what is sampled, graded, trained and measured."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from gft_lite.cli import main
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.training.run import train

OVERRIDES = [
    "train.steps=1", "train.problems_per_step=3", "data.problems=40", "data.holdout=4",
    "monitor.every=1", "monitor.problems=4", "eval.samples=2", "eval.k=[1]",
    "eval.sets.test.problems=4", "eval.sets.retention.problems=2", "rollout.stop=[;]",
]  # fmt: skip
# A response of the lab is `@314;012;024#024`: with `;` it ends after its first value, and has no
# answer. The base opens with other characters than `@`, too, and not all lines have a `;`.
FIRST_VALUE = 5


@pytest.fixture(scope="module")
def tokenizer():
    return load_policy(PolicySettings(gradient_checkpointing=False)).tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = Recipe.load("recipes/lab.yaml", OVERRIDES)
    return train(recipe, tmp_path_factory.mktemp("stop") / "run", console=Console(quiet=True)).path


def _assert_ends_at_stop(text):
    assert ";" not in text[:-1]
    assert text.endswith((";", "<eos>")) or len(text) > FIRST_VALUE


def test_samples_keep_the_tokens_of_the_stop_string_and_lose_its_text(run, tokenizer):
    groups = [json.loads(line) for line in next((run / "groups").iterdir()).open(encoding="utf-8")]
    responses = [response for group in groups for response in group["responses"]]
    samples = [r for r in responses if r["source"] == "self"]
    assert len(samples) == 3 * 4
    for sample in samples:
        whole = tokenizer.decode(sample["token_ids"])
        _assert_ends_at_stop(whole)
        assert sample["text"] == whole.partition(";")[0].removesuffix(tokenizer.eos_token)
    stopped = [s for s in samples if tokenizer.decode(s["token_ids"]).endswith(";")]
    assert stopped and {s["finish_reason"] for s in stopped} == {"stop"}
    # Demonstrations are graded by the same rule; their tokens stay whole.
    for expert in (r for r in responses if r["source"] == "expert"):
        whole = tokenizer.decode(expert["token_ids"])
        assert whole.count(";") > 0 and "#" in whole
        assert (expert["text"], expert["reward"]) == (whole.partition(";")[0], 0)


def test_the_evaluation_and_the_kl_set_end_there_too(run, tokenizer):
    base = json.loads((run / "eval" / "base.json").read_text(encoding="utf-8"))
    # With their whole responses, 17 tokens and more, the base solves some of these problems.
    assert base["test"]["length"] <= FIRST_VALUE + 1
    assert base["test"]["pass@1"] == 0
    assert base["test"]["no_answer"] == 1
    for _, ids in json.loads((run / "kl_set.json").read_text(encoding="utf-8")):
        _assert_ends_at_stop(tokenizer.decode(ids))


def test_a_suite_stops_and_an_old_store_is_graded_by_the_same_rule(tmp_path, tokenizer):
    arguments = ["eval", "lab", "--suite", "lab", "--limit", "4", "--samples", "2", "--k", "1",
                 "--out", str(tmp_path), "rollout.stop=[;]"]  # fmt: skip
    assert main(arguments) == 0
    first = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    [file] = tmp_path.glob("responses/*/test.jsonl")
    entries = [json.loads(line) for line in file.open(encoding="utf-8")]
    for entry in entries:
        _assert_ends_at_stop(tokenizer.decode(entry["token_ids"]))
        assert ";" not in entry["text"]
    # A store whose texts still have the stop string and an answer after it.
    entries = [entry | {"text": "@1;#1"} for entry in entries]
    file.write_text("".join(f"{json.dumps(e)}\n" for e in entries), encoding="utf-8")
    assert main(arguments) == 0
    again = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert again["reused"] > 0 == again["sampled"]
    assert again["targets"]["lab"]["benchmarks"] == first["targets"]["lab"]["benchmarks"]
    assert again["targets"]["lab"]["benchmarks"]["test"]["no_answer"] == 1
