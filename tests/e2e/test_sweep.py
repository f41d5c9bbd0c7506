"""`gft-lite sweep` on the lab: shared work, failures, interruption, several jobs, a local Ray."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import stopping_engine
import torch
from rich.console import Console
from safetensors.torch import load_file
from waiting import wait_for_end

from gft_lite import Sweep
from gft_lite.cli import main
from gft_lite.experiments.launchers import RayLauncher
from gft_lite.experiments.sweep_config import grid_override
from gft_lite.experiments.sweep_results import SweepFolder
from gft_lite.experiments.sweep_runner import sweep
from gft_lite.training.run import train
from gft_lite.utils.errors import RecipeError, UserError

SMALL = [
    "train.steps=2", "train.problems_per_step=3", "data.problems=40", "data.holdout=4",
    "monitor.every=1", "monitor.problems=2", "eval.samples=2", "eval.k=[1]",
    "eval.sets.test.problems=4", "eval.sets.retention.problems=2", "policy.quantization=none",
]  # fmt: skip
QUIET = Console(quiet=True)
# A user's reward functions: one raises, one kills the process of the trial, one works.
FINE = "def reward(completions, **_):\n    return [float(len(c) % 2) for c in completions]\n"
OWN = {
    "raises": "raise RuntimeError('no such luck')",
    "dies": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "fine": FINE,
}


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    """Modules with reward functions in the working directory."""
    for name, code in OWN.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*grid, seeds=1, changes=()):
    changes = [f"overrides.{text}" for text in (*SMALL, *changes)]
    return Sweep.load("recipes/lab.yaml", [*changes, *map(grid_override, grid), f"seeds={seeds}"])


def comparable(run):
    """The results of a run without those that differ between equal runs."""
    metrics, summary = run.metrics(), run.summary()
    for each in (*metrics, summary):
        each.pop("seconds")
        each.pop("peak_memory", None)
    return metrics, summary, load_file(run.adapter / "adapter_model.safetensors")


def assert_equal(run, other):
    metrics, summary, weights = zip(comparable(run), comparable(other), strict=True)
    assert metrics[0] == metrics[1]
    assert summary[0] == summary[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@contextmanager
def started_processes():
    """The programs that this process starts."""
    started, active = [], True

    def hook(event, arguments):  # An audit hook cannot be removed again.
        if active and event == "subprocess.Popen":
            started.append(arguments[0])

    sys.addaudithook(hook)
    yield started
    active = False


def states(folder):
    return {trial["name"]: trial["state"] for trial in folder.results()["trials"]}


class TestTwoJobs:
    @pytest.fixture(scope="class")
    def planned(self):
        return plan("objective.tau=0,0.5", seeds=2)

    @pytest.fixture(scope="class")
    def folder(self, planned, tmp_path_factory):
        return sweep(planned, tmp_path_factory.mktemp("sweep") / "out", jobs=2, console=QUIET)

    def test_every_trial_is_an_ordinary_run(self, planned, folder, tmp_path):
        assert set(states(folder).values()) == {"done"}
        last = planned.trials()[-1]
        alone = train(last.recipe, tmp_path / "alone", console=QUIET)
        assert_equal(folder.run(last.name), alone)

    def test_the_trials_of_a_process_share_a_base(self, planned, folder):
        """Two processes run four trials."""
        logs = [(folder.run(trial.name).path / "log.txt").read_text() for trial in planned.trials()]
        assert sum("base: of the run before" in log for log in logs) == 2

    def test_each_base_is_evaluated_once(self, planned, folder):
        """The base's samples have the run's seed: two seeds, two evaluations."""
        for name in ("eval/base.json", "kl_set.json"):
            files = {t.name: folder.run(t.name).path / name for t in planned.trials()}
            assert len(files) == 4
            times = {trial: file.stat().st_mtime_ns for trial, file in files.items()}
            assert len(set(times.values())) == 2
            for seed in (0, 1):
                assert times[f"tau=0,seed={seed}"] == times[f"tau=0.5,seed={seed}"]

    def test_results_are_those_of_the_runs(self, planned, folder):
        results = folder.results()
        names = [trial.name for trial in planned.trials()]
        assert [t["name"] for t in results["trials"]] == names
        for trial in results["trials"]:
            run = folder.run(trial["name"])
            assert trial["summary"] == run.summary()
            assert (folder.path / trial["folder"] / "log.txt").read_text().count("step ") == 2
            shares = [m["rectified"] for m in run.metrics()]
            assert trial["rectified"] == sum(shares) / len(shares)
        for point in results["settings"]:
            tau = point["settings"]["objective.tau"]
            a, b = (folder.run(f"tau={tau},seed={s}").summary()["trained"] for s in (0, 1))
            for figure in ("pass@1", "retention", "kl"):
                assert point["figures"][figure]["mean"] == pytest.approx(
                    (a[figure] + b[figure]) / 2
                )
        with (folder.path / "results.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert [(line["name"], line["objective.tau"], line["seed"]) for line in lines] == [
            (t["name"], str(t["settings"]["objective.tau"]), str(t["seed"]))
            for t in results["trials"]
        ]
        assert folder.frame()["trained/pass@1"].tolist() == [
            t["summary"]["trained"]["pass@1"] for t in results["trials"]
        ]

    def test_finished_trials_are_kept_and_another_recipe_is_an_error(self, planned, folder):
        with started_processes() as started:
            again = sweep(planned, folder.path, console=QUIET)
        assert started == []
        assert again.results() == folder.results()
        other = plan("objective.tau=0,0.5", seeds=2, changes=["optim.lr=1e-3"])
        with pytest.raises(RecipeError, match="--out: must be a new folder or one of the same"):
            sweep(other, folder.path, console=QUIET)

    def test_a_folder_in_use_is_an_error(self, planned, folder):
        hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); " \
               "print('held', flush=True); sys.stdin.read()"  # fmt: skip
        holder = subprocess.Popen([sys.executable, "-c", hold, str(folder.path / ".lock")],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RecipeError, match="--out: must not be in use"):
            sweep(planned, folder.path, console=QUIET)
        holder.communicate()

    def test_a_damaged_run_does_not_hide_the_others(self, planned, folder):
        """The last test of this class."""
        first, *_, last = (folder.run(trial.name) for trial in planned.trials())
        (first.path / "metrics.jsonl").write_text("not JSON\n")
        again = sweep(planned, folder.path, console=QUIET)
        damaged, *fine = again.results()["trials"]
        assert damaged["state"] == "failed" and {t["state"] for t in fine} == {"done"}
        assert damaged["reason"].startswith(f"{first.path / 'metrics.jsonl'}:1: ")
        assert fine[-1]["summary"] == last.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"jobs": 0}, "--jobs: must be at least 1, got 0."),
     ({"launcher": "slurm"}, "--launcher: must be local or ray, got 'slurm'.")],
)  # fmt: skip
def test_wrong_options_are_errors_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(UserError) as caught:
        sweep(plan(), tmp_path / "out", console=QUIET, **options)
    assert caught.value.problems == [message]
    assert not (tmp_path / "out").exists()


def test_failed_trials_are_reported_and_tried_again(own_rewards, capsys):
    command = ["sweep", "recipes/lab.yaml", *SMALL, "--out", "out", "--grid",
               "reward.functions=['raises:reward'],['dies:reward']"]  # fmt: skip
    assert main(command) == 1
    folder = SweepFolder("out")
    raises, dies = folder.results()["trials"]
    assert (raises["state"], dies["state"]) == ("failed", "failed")
    assert "no such luck" in raises["reason"]
    assert "killed by SIGKILL" in dies["reason"]
    assert "Traceback" in (folder.path / raises["folder"] / "log.txt").read_text()
    shown = capsys.readouterr()
    for trial in (raises, dies):
        assert f"failed: {trial['name']}: {trial['reason']}" in shown.out
        assert f"{trial['name']} failed" in shown.err
    assert [point["failed"] for point in folder.results()["settings"]] == [1, 1]
    for name in ("raises", "dies"):
        (own_rewards / f"{name}.py").write_text(FINE)
    assert main([*command, "--separate"]) == 0
    assert set(states(folder).values()) == {"done"}
    for trial in (raises, dies):
        log = (folder.path / trial["folder"] / "log.txt").read_text()
        assert "of the run before" not in log


def test_a_killed_and_an_interrupted_sweep_continue(tmp_path, fork_server):
    """The first trial ends; the second is killed, continues, is interrupted, and can go on."""
    changes = ["checkpoint.every=2", "monitor.every=0", "rollout.engine=stopping_engine:Engine"]
    grid = "train.steps=1,7"
    planned = plan(grid, changes=changes)
    first, second = planned.trials()
    folder = SweepFolder(tmp_path / "out")
    run = folder.run(second.name)
    command = ["sweep", "recipes/lab.yaml", *SMALL, *changes, "--grid", grid, "--out", folder.path]

    def stop_after(steps, number):
        moment = f"{number} {steps} {run.path}/metrics.jsonl"
        path = {"PYTHONPATH": str(Path(__file__).parent), stopping_engine.VARIABLE: moment}
        return fork_server.run(*command, env=os.environ | path)

    killed = stop_after(3, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    wait_for_end(run)
    assert len(run.metrics()) == 3
    assert states(folder) == {first.name: "done", second.name: "running"}
    written = (folder.run(first.name).path / "summary.json").stat().st_mtime_ns

    interrupted = stop_after(4, signal.SIGINT)
    assert interrupted.returncode == 130, interrupted.stderr
    assert "interrupted; the same command continues" in interrupted.stderr
    assert states(folder) == {first.name: "done", second.name: "interrupted"}
    assert (folder.run(first.name).path / "summary.json").stat().st_mtime_ns == written
    assert len(run.metrics()) == 5  # The step in which the signal came is the last.
    # It stopped after a step, with a checkpoint; from there it ends as if nothing had been.
    assert (run.checkpoints / "step-000005").exists()
    train(second.recipe, run.path, resume=True, console=QUIET)
    assert_equal(run, train(second.recipe, tmp_path / "alone", console=QUIET))


OWN_METHOD = """
from gft_lite.objective.losses import LossOutput
from gft_lite.objective.methods import Method

def loss(inputs, *, power: float = 1.0):
    weight = inputs.logprobs.detach().exp() ** power
    return LossOutput(-weight * inputs.logprobs, {"weight": weight})

METHOD = Method(loss, ("expert", "teacher"), "nobody", group_advantages=False)
"""


def test_a_grid_over_a_parameter_of_a_users_own_method(tmp_path, monkeypatch):
    """Its own metric is a figure of the sweep: p ** power is smaller for the larger power."""
    (tmp_path / "own_method.py").write_text(OWN_METHOD)
    monkeypatch.chdir(tmp_path)
    changes = ["method=own_method:METHOD", "group={expert: 1, teacher: 1, self: 0}"]
    folder = sweep(plan("objective.power=1,2", changes=changes), "out", console=QUIET)
    assert set(states(folder).values()) == {"done"}
    small, large = (row["figures"]["weight"]["mean"] for row in folder.results()["settings"])
    assert 0 < large < small < 1
    assert sweep(plan("objective.power=1,2", changes=changes), "out", console=QUIET)


def test_a_ray_that_can_t_be_reached_is_one_line(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:port")
    rule = "--launcher: ray must start, or be reached at RAY_ADDRESS, got Unable to parse port"
    with pytest.raises(UserError, match=rule):
        RayLauncher(1)


def test_a_local_ray_with_two_workers(own_rewards, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    planned = plan("reward.functions=['dies:reward'],['fine:reward']")
    folder = sweep(planned, "out", launcher="ray", jobs=2, console=QUIET)
    bad, good = folder.results()["trials"]
    assert (bad["state"], good["state"]) == ("failed", "done")
    assert "WorkerCrashedError" in bad["reason"]
    assert_equal(
        folder.run(good["name"]), train(planned.trials()[1].recipe, "alone", console=QUIET)
    )


def test_hours_are_measured_before_the_first_run(tmp_path):
    def within(hours):
        grid = [grid_override("objective.tau=0,1"), f"budget_hours={hours}"]
        changes = [f"overrides.{text}" for text in (*SMALL, "train.steps=4")]
        return sweep(Sweep.load("recipes/lab.yaml", [*changes, *grid]), tmp_path, console=QUIET)

    with pytest.raises(UserError, match=r"must be at least .* for 4 steps in each of 2 runs"):
        within(1e-6)
    assert not (tmp_path / "trials").exists()
    with started_processes() as started:
        folder = within(100)
    assert len(started) == 1  # That of the trials: the steps of the probe were there.
    trials = folder.results()["trials"]
    assert [(t["state"], len(folder.run(t["name"]).metrics())) for t in trials] == [("done", 4)] * 2
    assert within(100).results()["trials"] == trials
