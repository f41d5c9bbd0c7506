"""Evaluation while training, the best checkpoint, early stop and the collapse guard, on the lab."""

from __future__ import annotations

import pytest
from rich.console import Console

from gft_lite.evaluation.sets import SetEvaluator
from gft_lite.recipe.schema import Recipe
from gft_lite.runs import checkpoint
from gft_lite.runs.folder import RunFolder
from gft_lite.training.run import train
from gft_lite.utils.errors import RecipeError

SMALL = [
    "train.steps=4", "train.problems_per_step=2", "data.problems=20", "data.holdout=2",
    "monitor.every=2", "monitor.problems=1", "eval.samples=2", "eval.k=[1]", "checkpoint.keep=1",
    "eval.sets.test.problems=6", "eval.sets.retention.problems=2", "checkpoint.every=3",
    "policy.lora.dropout=0.1", "log.groups=false", "reward.workers=1",
]  # fmt: skip
EVALUATED = ["eval.every=2", "checkpoint.best={metric: test/pass@1, mode: min}",
             "checkpoint.adapter=best", "eval.problems=4"]  # fmt: skip
# The KL reaches the limit at every step.
ROLLBACK = [
    "guard={action: rollback, kl: 1e-12, window: 1, reward: null}", "monitor.every=1",
    "optim={lr: 1e-3, schedule: constant, warmup: 0}", "eval.every=1", "eval.problems=4",
    "checkpoint.best={metric: test/pass@1, mode: min}", "checkpoint.adapter=best",
]  # fmt: skip


def start(path, *overrides, **options):
    recipe = Recipe.load("recipes/lab.yaml", [*SMALL, *overrides])
    return train(recipe, path, console=Console(quiet=True), **options)


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def files(run):
    """The course of a run without times and memory: metrics, evaluations, summary, weights."""
    metrics = [{k: v for k, v in m.items() if k not in ("seconds", "peak_memory")}
               for m in run.metrics()]  # fmt: skip
    summary = {k: v for k, v in run.summary().items() if k != "seconds"}
    kept = [saved.name for saved in checkpoint.list_checkpoints(run.checkpoints)]
    return metrics, run.step_evaluations(), summary, kept, weights(run.adapter)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return start(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return start(tmp_path_factory.mktemp("evaluated") / "run", *EVALUATED)


def test_evaluating_does_not_change_training(plain, evaluated):
    ours, theirs = files(evaluated)[0], files(plain)[0]
    for step in ours:
        step.pop("eval", None), step.pop("best_step", None)
    assert ours == theirs
    name = "step-000004/adapter"
    assert weights(evaluated.checkpoints / name) == weights(plain.checkpoints / name)


def test_the_base_is_step_0_on_the_same_problems(evaluated):
    steps = evaluated.step_evaluations()
    assert list(steps) == [0, 2, 4]
    of_base = evaluated.evaluation("base")["test"]
    assert len(of_base["correct"]) == 6
    for sets in steps.values():
        assert (sets["test"]["problems"], sets["test"]["samples"]) == (4, 8)
        assert sets["test"]["correct"].keys() == steps[0]["test"]["correct"].keys()
        assert sets["retention"]["problems"] == 2  # A smaller set is evaluated as it is.
    assert steps[0]["test"]["correct"].items() <= of_base["correct"].items()
    shown = {m["step"]: m["eval"] for m in evaluated.metrics() if "eval" in m}
    assert list(shown) == [2, 4]
    assert shown[2]["test"]["pass@1"] == steps[2]["test"]["pass@1"]


def test_the_best_of_equal_checkpoints_is_the_earliest_and_becomes_the_adapter(evaluated):
    """After so little training no sample has changed."""
    steps = evaluated.step_evaluations()
    assert steps[2]["test"]["correct"] == steps[4]["test"]["correct"]
    saved = checkpoint.list_checkpoints(evaluated.checkpoints)
    assert [folder.name for folder in saved] == ["step-000002", "step-000004"]
    assert weights(evaluated.adapter) == weights(saved[0] / "adapter")
    assert weights(evaluated.adapter) != weights(saved[1] / "adapter")
    summary = evaluated.summary()
    assert (summary["best_step"], summary["policy_of_step"]) == (2, 2)


# --- the guard, and kills --------------------------------------------------------------------


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    return start(tmp_path_factory.mktemp("rolled_back") / "run", *ROLLBACK)


def test_rollbacks_lower_the_rate_and_the_alarm_after_the_last_ends_training(rolled_back, plain):
    metrics = rolled_back.metrics()
    assert [m["guard"] for m in metrics] == [
        {"alarms": ["kl"], "action": "rollback", "restored": 0},
        {"alarms": ["kl"], "action": "rollback", "restored": 1},
        {"alarms": ["kl"], "action": "stop"},
    ]
    assert [m.get("stopped") for m in metrics] == [None, None, "guard"]
    assert [m["lr"] for m in metrics] == [1e-3, 5e-4, 2.5e-4]
    # Step 2 began where step 1 did, so that its policy served the same log-probs.
    first, second, third = (rolled_back.step_evaluation(step)["adapter"] for step in (1, 2, 3))
    assert first == second != third
    summary = rolled_back.summary()
    assert summary["guard"] == {"alarms": {"kl": 3}, "rollbacks": 2}
    assert (summary["stopped"], summary["steps"]) == ("guard", 3)
    assert plain.summary()["guard"] == {"alarms": {}, "rollbacks": 0}


class Killed(Exception):
    """The end of a process at a chosen moment."""


def fail_at_call(monkeypatch, owner, name, number):
    """Raise at a call of a function, counted from 1; returns the list of its calls."""
    original, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


# What the resumed run samples: steps 2 and 3 and the end, and step 2 only if it was not finished.
@pytest.mark.parametrize(
    ("owner", "name", "call", "evaluations"),
    [(SetEvaluator, "evaluate", 3, 3), (checkpoint, "save", 3, 2)],
)
def test_killed_in_an_evaluation_or_between_it_and_the_checkpoint(
    owner, name, call, evaluations, rolled_back, tmp_path, monkeypatch
):
    with monkeypatch.context() as disturbed:
        fail_at_call(disturbed, owner, name, call)
        with pytest.raises(Killed):
            start(tmp_path / "run", *ROLLBACK)
    assert len(RunFolder(tmp_path / "run").metrics()) == (1 if name == "evaluate" else 2)
    sampled = fail_at_call(monkeypatch, SetEvaluator, "evaluate", None)
    resumed = start(tmp_path / "run", *ROLLBACK, resume=True)
    assert len(sampled) == evaluations
    assert files(resumed) == files(rolled_back)


# --- early stop ------------------------------------------------------------------------------


def test_an_early_stop_is_final_and_its_evaluation_of_all_problems_the_last(tmp_path, monkeypatch):
    sampled = fail_at_call(monkeypatch, SetEvaluator, "evaluate", None)
    settings = ["eval.every=1", "early_stop={patience: 1, min_delta: 0.99}"]
    run = start(tmp_path / "run", *settings)
    assert [m.get("stopped") for m in run.metrics()] == ["early_stop"]
    assert len(sampled) == 2  # The base, and step 1 once.
    assert run.evaluation("trained") == run.step_evaluations()[1]
    ended = files(run)
    assert files(start(run.path, *settings, resume=True)) == ended


def test_a_figure_that_the_evaluation_does_not_have_is_named(plain):
    with pytest.raises(RecipeError) as caught:
        start(plain.path.parent / "other", *EVALUATED,
              "checkpoint.best={metric: test/mean_reward}")  # fmt: skip
    assert caught.value.problems == [
        "checkpoint.best.metric: must be a figure of the evaluation, test/pass@1, "
        "retention/pass@1, got 'test/mean_reward'."
    ]
