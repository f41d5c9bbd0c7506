"""`gft-lite referee` on the lab: killed and continued, then with a further seed and a method that
fails half-way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import chdir
from pathlib import Path

import pytest
import stopping_engine
import torch
from rich.console import Console
from safetensors.torch import load_file
from waiting import wait_for_end

from gft_lite.cli import main
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.training.run import train

RECIPE = """
extends: [recipes/lab.yaml]
policy: {quantization: none}
data: {problems: 40, holdout: 4}
rollout: {engine: "stopping_engine:Engine"}
train: {steps: 2, problems_per_step: 2}
monitor: {every: 0, problems: 2}
checkpoint: {every: 1}
log: {groups: false}
eval:
  samples: 2
  k: [1]
  sets:
    test: {problems: 4}
    retention: {problems: 2}
    dev: {source: lab, split: tune, problems: 4}
"""
# Fails in the second half of its budget.
BROKEN = """
from gft_lite.objective.losses import LossOutput
from gft_lite.objective.methods import Method

def loss(inputs):
    if inputs.progress > 0.5:
        raise RuntimeError("no such luck")
    return LossOutput(-inputs.logprobs)

METHOD = Method(loss, ("expert",), "an example", needs=("progress",), group_advantages=False,
                defaults={"group": {"expert": 1, "teacher": 0, "self": 0, "shortfall": "drop"}})
"""
OPTIONS = ["--tune", "2", "--tune-set", "dev", "--out", "out"]


def finished(out):
    """The time at which each finished run ended."""
    files = out.glob("*/trials/*/summary.json")
    return {str(f.parent.relative_to(out)): f.stat().st_mtime_ns for f in files}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("referee")
    (folder / "small.yaml").write_text(RECIPE)
    (folder / "broken.py").write_text(BROKEN)
    shutil.copy(stopping_engine.__file__, folder)
    with chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def killed(here, fork_server):
    """A referee of two methods that was killed in its last run; the runs finished before."""
    line = ["referee", "small.yaml", "--methods", "sft,gft", "--seeds", "1", *OPTIONS]
    moment = f"{signal.SIGKILL} 1 {here}/out/main/trials/recipe=gft*/metrics.jsonl"
    done = fork_server.run(*line, env=os.environ | {stopping_engine.VARIABLE: moment})
    assert done.returncode == -signal.SIGKILL, done.stderr
    [last] = (here / "out" / "main" / "trials").glob("recipe=gft*")
    run = RunFolder(last)
    wait_for_end(run)
    assert len(run.metrics()) == 1
    return here / "out", finished(here / "out")


@pytest.fixture(scope="module")
def done(killed):
    """The same continued, with a further seed and a method that fails; its exit code."""
    out, _ = killed
    line = ["referee", "small.yaml", "--methods", "sft,gft,broken:METHOD", "--seeds", "2"]
    return out, main([*line, *OPTIONS])


def test_the_killed_run_is_the_uninterrupted_one(done, tmp_path):
    [folder] = done[0].glob("main/trials/recipe=gft*seed=1")
    run = RunFolder(folder)
    recipe = Recipe.load(run.path / "recipe.yaml")
    whole = train(recipe, tmp_path / "whole", console=Console(quiet=True))
    assert run.summary()["trained"] == whole.summary()["trained"]
    saved = [load_file(r.adapter / "adapter_model.safetensors") for r in (run, whole)]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())


def test_finished_runs_are_kept_when_a_seed_and_a_method_are_added(killed, done):
    out, before = killed
    after = finished(out)
    assert len(before) == 9  # Eight that tune, and one of the main runs.
    assert {run: after[run] for run in before} == before
    assert len(after) == 8 + 4


def test_methods_are_tuned_alike_on_a_set_of_its_own_and_compared_on_the_others(done):
    out, _ = done
    runs = sorted(finished(out))
    tuned = [run for run in runs if run.startswith("tune/")]
    assert [sum(f"recipe={m}_" in run for run in tuned) for m in ("gft", "sft")] == [4, 4]
    for run in runs:
        recipe = Recipe.load(out / run / "recipe.yaml")
        tuning = run.startswith("tune/")
        assert list(recipe.eval.sets) == (["tune"] if tuning else ["test", "retention"])
        assert recipe.seed in ([0] if tuning else [1, 2])
    scores = {}
    for run in tuned:
        name, summary = run.partition("recipe=")[2], RunFolder(out / run).summary()
        scores.setdefault(name[:3], {})[name] = summary["trained"]["pass@1"]
    for run in runs:
        if run.startswith("main/"):
            name = run.partition("recipe=")[2].partition("seed=")[0] + "seed=0"
            assert scores[name[:3]][name] == max(scores[name[:3]].values())


def test_the_base_is_evaluated_once_for_each_seed(done):
    out, _ = done
    for part, files, times in (("tune", 10, 1), ("main", 4, 2)):
        found = list(out.glob(f"{part}/trials/*/eval/base.json"))
        assert len(found) == files
        assert len({file.stat().st_mtime_ns for file in found}) == times


def test_every_method_had_the_same_number_of_responses(done):
    out, _ = done
    found = {}
    for run in finished(out):
        counts = [m["trajectories"] for m in RunFolder(out / run).metrics()]
        found.setdefault(run.partition("recipe=")[2][:3], []).append(counts)
    assert found == {"gft": [[16, 16]] * 6, "sft": [[16, 16]] * 6}


def test_a_method_that_fails_half_way_leaves_the_verdict_on_the_others(done):
    out, code = done
    assert code == 1
    result = json.loads((out / "referee.json").read_text())
    by_method = [(o["method"], o["seed"]) for o in result["outcomes"]]
    assert sorted(by_method) == [("gft", 1), ("gft", 2), ("sft", 1), ("sft", 2)]
    failed = {(f["method"], f["part"]): f["reason"] for f in result["failures"]}
    assert set(failed) == {("broken:METHOD", "tune")}
    page = (out / "referee.md").read_text()
    assert "no such luck" in page and "| sft |" in page
    folder = out / "tune" / "trials" / "recipe=broken-METHOD_lr0.002,seed=0"
    assert len(RunFolder(folder).metrics()) == 1


def test_an_outcome_is_what_its_run_says(done):
    out, _ = done
    for outcome in json.loads((out / "referee.json").read_text())["outcomes"]:
        run = RunFolder(out / outcome["folder"])
        summary, trained = run.summary(), run.evaluation("trained")
        assert outcome["figures"] == summary["trained"]
        assert outcome["cost"]["trajectories"] == summary["trajectories"] == 32
        assert outcome["kl"] == summary["trained"]["kl"]
        for name in ("test", "retention"):
            shares = {p: c / 2 for p, c in trained[name]["correct"].items()}
            assert outcome["scores"][name] == shares
        assert outcome["base"] == "lab" and outcome["settings"]["optim.lr"] == (
            Recipe.load(run.path / "recipe.yaml").optim.lr
        )


def test_other_options_in_the_folder_are_one_line(done, capsys):
    line = ["referee", "small.yaml", "--methods", "sft,gft", "--seeds", "2", *OPTIONS]
    assert main([*line, "--margin", "0.05"]) == 2
    errors = capsys.readouterr().err
    assert errors == (
        "--out: must be a new folder or one of the same comparison, got another in out: "
        "--margin 0.01, now 0.05, --methods with broken:METHOD, now without. "
        "Choose another folder.\n"
    )


def test_the_plan_says_what_is_finished(done, capsys):
    assert Path("out/plan.json").exists()
    line = ["referee", "small.yaml", "--methods", "sft,gft,broken:METHOD", "--seeds", "2"]
    assert main([*line, *OPTIONS, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "runs: 12 to tune, 6 to compare" in printed
    assert "finished: 12 of 18 runs in out" in printed
