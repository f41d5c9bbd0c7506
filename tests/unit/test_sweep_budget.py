"""The hours of a sweep: what is counted, which steps fit, and what is refused."""

from __future__ import annotations

import json

import pytest

from gft_lite.experiments.sweep_budget import (
    Pace,
    describe_cost,
    earlier_start,
    probe_trial,
    within_budget,
)
from gft_lite.experiments.sweep_config import Sweep, grid_override
from gft_lite.experiments.sweep_results import SweepFolder
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import RecipeError, UserError


def plan(*changes, grid="objective.tau=0,0.5"):
    return Sweep.load("recipes/lab.yaml", [grid_override(grid), *changes])


@pytest.fixture
def probe(tmp_path):
    """A run of three steps: 100 s in all, 20 s of two evaluations, steps of 30, 4 and 6 s."""

    def make(of):
        run = RunFolder(tmp_path / "probe")
        run.create(probe_trial(of).recipe.to_yaml())
        steps = [{"rollout": 20.0, "train": 10.0}, {"train": 4.0}, {"rollout": 2.0, "train": 4.0}]
        lines = [json.dumps({"step": i, "seconds": s}) + "\n" for i, s in enumerate(steps, 1)]
        (run.path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        summary = {"trained": {}, "seconds": {"total": 100.0, "eval": 20.0}}
        (run.path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return run

    return make


def test_the_first_step_is_left_out_of_the_pace(probe):
    assert Pace.measured(probe(plan())) == Pace(start=40.0, step=5.0, evaluation=10.0)


def test_seconds_count_each_base_once_and_evaluations_while_training(probe):
    pace = Pace(start=40.0, step=5.0, evaluation=10.0)
    assert pace.seconds(plan().trials(), 7) == 2 * (40 + 7 * 5) + (1 + 2) * 10
    two_seeds = plan("seeds=2")  # The samples of a base are drawn by the seed.
    assert pace.seconds(two_seeds.trials(), 7) == 4 * (40 + 7 * 5) + (2 + 4) * 10
    often = plan("overrides.eval.every=3")
    assert pace.seconds(often.trials(), 7) == 2 * (40 + 7 * 5) + (1 + 2 * 3) * 10


@pytest.mark.parametrize(
    ("seconds", "steps"), [(210, 10), (209.9, 9), (160, 5), (709.9, 59), (1e6, 60)]
)
def test_as_many_steps_as_fit(seconds, steps, probe):
    # 110 s besides steps: 2 * 40 of starts, 3 * 10 of evaluations. A step costs 2 * 5 s.
    wanted = plan(f"budget_hours={seconds / 3600}")
    shortened, text = within_budget(wanted, probe(wanted))
    assert {trial.recipe.train.steps for trial in shortened.trials()} == {steps}
    assert [t.settings for t in shortened.trials()] == [t.settings for t in wanted.trials()]
    assert f"{steps} of 60 steps in each of 2 runs" in text


def test_a_sweep_of_fewer_steps_than_the_least_keeps_them(probe):
    wanted = plan("budget_hours=1", "overrides.train.steps=3")
    shortened, _ = within_budget(wanted, probe(wanted))
    assert {trial.recipe.train.steps for trial in shortened.trials()} == {3}


def test_too_few_hours_say_how_many_are_needed(probe):
    wanted = plan("budget_hours=0.04")
    with pytest.raises(UserError) as error:
        within_budget(wanted, probe(wanted))
    assert str(error.value) == (
        "budget_hours: must be at least 0.044 for 5 steps in each of 2 runs, got 0.04. Give more "
        "hours, or fewer values or seeds."
    )


def test_the_probe_is_the_trial_with_the_most_own_samples_cut_to_three_steps():
    wanted = plan("budget_hours=1", grid="group=4:4,2:6,3:5")
    trial = probe_trial(wanted)
    assert (trial.settings, trial.recipe.train.steps) == ({"group": "2:6"}, 3)
    lines = describe_cost(wanted)
    assert lines[0].startswith("memory: ") and "GiB" in lines[0]
    probe = "3 steps of group=2-6,seed=0 measure how long a step takes"
    assert lines[-1] == f"time: 1 h in all; {probe}"


def test_the_same_command_keeps_the_steps_of_its_first_start(probe, tmp_path):
    wanted, folder = plan("budget_hours=0.05"), SweepFolder(tmp_path)
    assert earlier_start(wanted, folder) is None
    shortened, _ = within_budget(wanted, probe(wanted))
    (tmp_path / "sweep.yaml").write_text(shortened.to_yaml(), encoding="utf-8")
    assert earlier_start(wanted, folder) == shortened
    assert earlier_start(plan("budget_hours=0.06"), folder) is None
    assert earlier_start(plan("budget_hours=0.05", "seeds=2"), folder) is None


@pytest.mark.parametrize(
    ("changes", "grid", "rule"),
    [
        ((), "train.steps=5,6", "one train.steps, got steps [5, 6]"),
        (("overrides.budget.tokens=1000",), "objective.tau=0,1", "got a budget"),
        (("overrides.stages=[sft, grpo]",), "objective.tau=0,1",
         "got stages"),
        (("search.trials=2",), "objective.tau=0,1", "budget_hours: must not be given with search"),
        (("budget_hours=0",), "objective.tau=0,1", "greater than 0"),
        (("budget_hours=.inf",), "objective.tau=0,1", "finite"),
    ],
)  # fmt: skip
def test_what_no_hours_can_shorten_is_refused(changes, grid, rule):
    with pytest.raises(RecipeError) as error:
        probe_trial(plan("budget_hours=1", *changes, grid=grid))
    assert rule in str(error.value)
