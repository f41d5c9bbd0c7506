"""Killed, interrupted or out of disk space at any moment: `--resume` ends with equal results.

Elsewhere: a killed evaluation (test_eval.py), a killed sweep and a trial's process killed
(test_sweep.py), runs killed in a later stage (test_stages_and_budgets.py).
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gft_lite.runs import checkpoint
from gft_lite.runs.folder import RunFolder

SMALL = [
    "train.steps=3", "train.problems_per_step=2", "train.micro_batch_tokens=200",
    "data.problems=20", "data.holdout=2", "monitor.every=0", "monitor.problems=1",
    "policy.lora.dropout=0.1", "policy.quantization=none", "eval.samples=1", "eval.k=[1]",
    "eval.sets.test.problems=2", "eval.sets.retention.problems=2", "checkpoint.every=1",
    "reward.workers=1",
]  # fmt: skip
STAGES = ["stages=[sft, gft]", "train.steps=2"]
VLLM = ["rollout.engine=vllm", "rollout.dtype=float32", "train.steps=2", "policy.quantization=nf4"]

DECODE = "gft_lite.rollout.transformers_engine:TransformersEngine._append"
RENAME = "pathlib:Path.rename"


def at(function, step=None, call=1, act="kill", **more):
    where = {} if step is None else {"step": step}
    return {"at": function, "acts": {str(call): act}, **where, **more}


# The moment, and the step of the newest checkpoint at that moment.
KILLED = {
    "base evaluation": (at("gft_lite.evaluation.sets:measure", 0, call=2), 0),
    "base evaluation written": (at(RENAME, 0, matching="base.json.tmp"), 0),
    "rollout": (at(DECODE, 2, call=5), 1),
    "reward": (at("gft_lite.rewards.scorer:Scorer._combine", 2, call=3), 1),
    "groups half written": (at("gft_lite.runs.folder:RunFolder._write_groups", 2, act="tear",
                               file="groups/step-000002.jsonl", after=True), 1),
    "backward": (at("gft_lite.policy.lora:LoraPolicy.backward", 2, call=2), 1),
    "optimiser step": (at("torch.optim:AdamW.step", 2, after=True), 1),
    "adapter half written": (at("gft_lite.policy.lora:LoraPolicy.save_adapter", 2,
                                matching="adapters/v2", act="tear", after=True,
                                file="engine/adapters/v2/adapter_model.safetensors"), 1),
    "sync": (at("gft_lite.rollout.transformers_engine:TransformersEngine.sync", 2), 1),
    "log half written": (at("gft_lite.runs.folder:RunFolder.append_metrics", 2, act="tear",
                            file="metrics.jsonl", after=True), 1),
    "log written": (at("gft_lite.runs.folder:RunFolder.append_metrics", 2, after=True), 1),
    "checkpoint half written": (at("safetensors.torch:save_file", 2, act="tear", after=True,
                                   matching="optimizer.safetensors",
                                   file="checkpoints/step-000002.tmp/optimizer.safetensors"), 1),
    "checkpoint not yet named": (at("gft_lite.runs.checkpoint:_write_manifest", 2, after=True), 1),
    "checkpoint before goes": (at("shutil:rmtree", 2, matching="step-000001"), 2),
    "last evaluation": (at("gft_lite.evaluation.sets:measure", 3, call=2), 3),
    "final adapter": (at(RENAME, 3, matching="{folder}/adapter.tmp"), 3),
    "summary": (at(RENAME, 3, matching="summary.json.tmp"), 3),
}  # fmt: skip
# Signals, and the exit code, the steps in the log and the step of the newest checkpoint.
SIGNALLED = {
    "one SIGINT": (at(DECODE, 2, call=5, act="interrupt"), 130, 2, 2),
    "one SIGTERM": (at(DECODE, 2, call=5, act="terminate"), 130, 2, 2),
    "SIGINT in the last step": (at(DECODE, 3, call=5, act="interrupt"), 130, 3, 3),
    "SIGINT after a step": (
        at("gft_lite.runs.console:TrainingConsole.step", 1, act="interrupt"),
        130,
        1,
        1,
    ),
    "two SIGINT": ({**at(DECODE, 2), "acts": {"5": "interrupt", "7": "interrupt"}}, 130, 1, 1),
    "SIGINT in an evaluation": (
        at("gft_lite.evaluation.sets:measure", 0, act="interrupt"),
        130,
        0,
        0,
    ),
}
# Before the second stage, at its start, and when the results of both are joined.
STAGED = {
    "between stages": at("gft_lite.training.stages:copy_base_files"),
    "second stage begins": at(RENAME, matching="2-gft/recipe.yaml.tmp"),
    "stages put together": at("gft_lite.runs.folder:RunFolder.write_json", matching="sft > gft"),
}
# Full when a checkpoint is written, and when an adapter is written for the engine.
FULL = {
    "full": at("gft_lite.training.learner:Learner.save", 2, act="full"),
    "full at a sync": at("gft_lite.rollout.policy_engine:PolicyEngine.sync", 2,
                         act="full_for_adapters"),
}  # fmt: skip
BROKEN = at("vllm.v1.engine.llm_engine:LLMEngine.step", 2, call=4, act="fail")
KEEP_ONE = "checkpoint.keep=1"  # The removal of the previous checkpoint is then disturbed.


# The folder at these moments is copied from one run, and the copies are resumed.
COPIED = [name for name in KILLED if name != "checkpoint before goes"]
COPIED_STAGES = ["between stages", "second stage begins"]
COPYING = {"kill": "keep_copy", "tear": "keep_torn_copy"}


def whole_jobs(folder):
    """The runs that come to their end, and what is copied from them on the way."""
    copies = [_copying(name, KILLED[name][0]) for name in COPIED]
    yield _job(folder, "whole", (False, *copies))
    copies = [_copying(name, STAGED[name]) for name in COPIED_STAGES]
    yield _job(folder, "staged", (False, *copies), overrides=STAGES)


def other_jobs(folder):
    """The disturbed runs: their names, their folders and their attempts."""
    resumed = (True,)
    for name in COPIED:
        yield _job(folder, name, resumed, start="whole")
    before = "checkpoint before goes"
    yield _job(folder, before, (False, KILLED[before][0]), resumed, overrides=[KEEP_ONE])
    for name, (moment, *_) in SIGNALLED.items():
        yield _job(folder, name, (False, moment), resumed)
    twice = (KILLED["rollout"][0], KILLED["log written"][0])
    yield _job(folder, "twice", (False, twice[0]), (True, twice[1]), resumed)
    unstarted = (False, at(RENAME, matching="recipe.yaml.tmp"))
    yield _job(folder, "no recipe yet", unstarted, (False,))
    yield _job(folder, "no recipe yet, resumed", unstarted, resumed)
    for name, moment in FULL.items():
        yield _job(folder, name, (False, moment), resumed)
    yield _job(folder, "second", (False, at("gft_lite.policy.qlora:load", act="occupy")))
    for name, moment in STAGED.items():
        if name in COPIED_STAGES:
            yield _job(folder, name, resumed, overrides=STAGES, start="staged")
        else:
            yield _job(folder, name, (False, moment), resumed, overrides=STAGES)
    if importlib.util.find_spec("vllm"):
        yield _job(folder, "vllm", (False,), overrides=VLLM)
        killed = (False, at("gft_lite.rollout.vllm_engine:VllmEngine.sync", 2))
        yield _job(folder, "vllm killed", killed, resumed, overrides=VLLM)
        yield _job(folder, "vllm broken", (False, BROKEN), overrides=VLLM)


def _job(folder, name, *attempts, overrides=(), start=None):
    """A run in `folder`: each attempt is whether it resumes, and the moments that are armed."""
    own = folder / name.replace(" ", "_")
    arguments = ["train", "recipes/lab.yaml", *SMALL, *overrides, "--out", str(own)]
    made = [
        ([*arguments, "--resume"] if resume else arguments, [_with_folder(m, own) for m in moments])
        for resume, *moments in attempts
    ]
    begun = {"start": str(_copy(folder / start, name))} if start else {}
    return {"name": name, "folder": str(own), "attempts": made, **begun}


def _copy(folder, name):
    """The copy of a whole run's folder at a moment."""
    return folder.with_name(f"{folder.name}-{name.replace(' ', '_')}")


def _copying(name, moment):
    acts = {call: COPYING[act] for call, act in moment["acts"].items()}
    return {**moment, "acts": acts, "copy": name.replace(" ", "_")}


def _with_folder(moment, folder):
    matching = moment.get("matching", "").replace("{folder}", str(folder))
    return {**moment, "matching": matching}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """How the attempts at a run ended: exit code, output and folder, by the run's name.

    A copy of a whole run counts as an attempt that was killed.
    """
    folder = tmp_path_factory.mktemp("runs")
    plan = {"whole": list(whole_jobs(folder)), "others": list(other_jobs(folder))}
    (folder / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("crash_runs.py")
    subprocess.run([sys.executable, script, folder / "plan.json"], check=True, timeout=3600)

    def attempts(job):
        own = Path(job["folder"])
        if "start" in job:
            yield SimpleNamespace(code=-signal.SIGKILL, output="", run=RunFolder(job["start"]))
        for number in range(len(job["attempts"])):
            left = own.with_name(f"{own.name}.{number}")
            code = int(left.with_name(f"{left.name}.code").read_text())
            output = left.with_name(f"{left.name}.txt").read_text(encoding="utf-8")
            yield SimpleNamespace(code=code, output=output, run=RunFolder(left))

    return {job["name"]: list(attempts(job)) for part in plan.values() for job in part}


def lines(run):
    """The complete lines of the log as text; their seconds differ if a step is run again."""
    file = run.path / "metrics.jsonl"
    return file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []


def last_step(run):
    saved = checkpoint.list_checkpoints(run.checkpoints)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def comparable(run):
    """Metrics, groups and summary of a run, without times and memory."""
    summary = {k: v for k, v in run.summary().items() if k not in ("seconds", "name")}
    metrics = [{k: v for k, v in m.items() if k not in ("seconds", "peak_memory")}
               for m in run.metrics()]  # fmt: skip
    groups = [run.groups(step) for step in run.group_steps()]
    return metrics, groups, summary


def assert_same_end(run, whole):
    for ours, theirs in zip(comparable(run), comparable(whole), strict=True):
        assert ours == theirs
    file = "adapter_model.safetensors"
    ours, theirs = load_file(run.adapter / file), load_file(whole.adapter / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert not list(run.path.rglob("*.tmp"))
    assert not run.scratch.exists()


@pytest.fixture(scope="module")
def whole(runs):
    [only] = runs["whole"]
    assert only.code == 0, only.output
    assert [m["step"] for m in only.run.metrics()] == [1, 2, 3]
    return only.run


@pytest.mark.parametrize("name", KILLED)
def test_killed(name, runs, whole):
    saved = KILLED[name][1]
    killed, resumed = runs[name]
    assert killed.code == -signal.SIGKILL, killed.output
    assert last_step(killed.run) == saved
    assert len(lines(killed.run)) >= saved
    assert resumed.code == 0, resumed.output
    # What the checkpoint covers was not run again, and what it doesn't was.
    assert lines(resumed.run)[:saved] == lines(killed.run)[:saved]
    assert not set(lines(resumed.run)[saved:]) & set(lines(killed.run))
    assert_same_end(resumed.run, whole)


@pytest.mark.parametrize("name", SIGNALLED)
def test_signalled(name, runs, whole):
    _, code, steps, saved = SIGNALLED[name]
    stopped, resumed = runs[name]
    assert stopped.code == code, stopped.output
    assert "interrupted; continue with --resume" in stopped.output
    assert (len(lines(stopped.run)), last_step(stopped.run)) == (steps, saved)
    assert resumed.code == 0, resumed.output
    assert lines(resumed.run)[:saved] == lines(stopped.run)
    assert_same_end(resumed.run, whole)


def test_killed_twice(runs, whole):
    first, second, third = runs["twice"]
    assert (first.code, second.code, third.code) == (-signal.SIGKILL, -signal.SIGKILL, 0)
    assert_same_end(third.run, whole)


@pytest.mark.parametrize("name", ["no recipe yet", "no recipe yet, resumed"])
def test_killed_before_recipe_yaml_both_commands_start_again(name, runs, whole):
    killed, again = runs[name]
    assert (killed.code, again.code) == (-signal.SIGKILL, 0), again.output
    assert not (killed.run.path / "recipe.yaml").exists()
    assert_same_end(again.run, whole)


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_keeps_the_previous_checkpoint_and_the_error_names_resume(name, runs, whole):
    stopped, resumed = runs[name]
    assert stopped.code == 1
    [error] = [line for line in stopped.output.splitlines() if "continue with --resume" in line]
    if name == "full":
        assert "checkpoint: could not write" in error
        assert "Older ones are untouched: step-000001. Make room" in error
    else:
        assert "The disk is full: make room; continue with --resume." in error
    assert "Traceback" not in stopped.output
    [saved] = stopped.run.checkpoints.iterdir()
    assert saved.name == "step-000001"
    assert checkpoint.find_damage(saved) is None
    assert resumed.code == 0, resumed.output
    assert_same_end(resumed.run, whole)


def test_the_second_of_two_runs_started_at_once_stops_before_it_writes(runs):
    [second] = runs["second"]
    assert second.code == 2
    assert "--out: must not be in use by another run" in second.output
    assert [p.name for p in second.run.path.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", STAGED)
def test_killed_in_a_staged_run(name, runs):
    [staged] = runs["staged"]
    killed, resumed = runs[name]
    assert (staged.code, killed.code, resumed.code) == (0, -signal.SIGKILL, 0), resumed.output
    assert_same_end(resumed.run, staged.run)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
class TestVllm:
    """The engine runs in the trainer's process: it ends with it, or raises."""

    @pytest.fixture(scope="class")
    def alone(self, runs):
        [only] = runs["vllm"]
        assert only.code == 0, only.output
        return only.run

    def test_killed(self, runs, alone):
        killed, resumed = runs["vllm killed"]
        assert (killed.code, resumed.code) == (-signal.SIGKILL, 0), resumed.output
        assert_same_end(resumed.run, alone)

    def test_an_engine_that_breaks_down_is_started_again(self, runs, alone):
        [broken] = runs["vllm broken"]
        assert broken.code == 0, broken.output
        text = "rollout: vllm failed. RuntimeError: broken at this moment Starting it again."
        assert broken.output.count(text) == 1
        assert_same_end(broken.run, alone)
