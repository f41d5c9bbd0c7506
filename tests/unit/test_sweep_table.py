"""The live table of a sweep on a narrow terminal."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from gft_lite.experiments.sweep_config import Sweep, grid_override
from gft_lite.experiments.sweep_runner import _Job, _state_table
from gft_lite.runs.folder import RunFolder

REWARD = {"expert": 1.0, "self": 0.4375}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_running_trial_comes_first_with_step_and_reward(width, tmp_path):
    grid = [grid_override("optim.lr=1e-3,2e-3"), grid_override("objective.tau=0,0.25,0.75")]
    plan = Sweep.load("recipes/lab.yaml", [*grid, "seeds=3"])
    work = [_Job(trial, RunFolder(tmp_path / trial.name)) for trial in plan.trials()]
    work[7].state = "running"
    work[7].run.path.mkdir()
    lines = [json.dumps({"step": step, "reward": REWARD}) + "\n" for step in range(1, 9)]
    (work[7].run.path / "metrics.jsonl").write_text("".join(lines))
    out = io.StringIO()
    Console(file=out, width=width).print(_state_table(work, width, rows=5))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    title, _, head, _, first, *rest = lines
    assert title.strip() == "1 running, 17 waiting"
    assert head.split() == ["trial", "state", "step", "reward", "result"]
    name, state, step, *reward = first.split()
    assert (state, step, reward[:2]) == ("running", "8/60", ["self", "0.44"])
    assert (reward[2:] == ["expert", "1.00"]) is (width >= 90)
    assert name == "lr=0.001,tau=0.75,seed=1" or name.endswith("…")
    assert sum("waiting" in line for line in rest) == 4
