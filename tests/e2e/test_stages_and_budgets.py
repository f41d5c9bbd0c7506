"""Stages, budgets and dynamic sampling on the lab."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.training_sections import OptimSettings
from gft_lite.runs.folder import RunFolder
from gft_lite.runs.metrics import training_seconds
from gft_lite.training.learner import Learner
from gft_lite.training.optim import learning_rate
from gft_lite.training.run import train
from gft_lite.utils.errors import RecipeError

QUIET = Console(quiet=True)
SMALL = [
    "train.steps=2", "train.problems_per_step=3", "data.problems=40", "data.holdout=4",
    "monitor.problems=2", "eval.samples=2", "eval.k=[1]", "eval.sets.test.problems=4",
    "eval.sets.retention.problems=2", "checkpoint.every=1", "eval.every=2", "eval.problems=2",
    "guard.window=1", "policy.quantization=none",
]  # fmt: skip
STAGES = "stages=[{method: sft, overrides: {optim: {lr: 1e-2}}}, gft, {method: grpo, " \
         "reference: start, overrides: {train: {steps: 3}}}]"  # fmt: skip


def small(*overrides):
    return Recipe.load("recipes/lab.yaml", [*SMALL, *overrides])


def weights(run):
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.fixture
def kill_after_a_step(fork_server):
    """Start a run in a process of its own that is killed after so many steps."""

    def kill(run, steps, *overrides):
        arguments = ["train", "recipes/lab.yaml", *SMALL, *overrides, "--out", run.path]
        moment = ("gft_lite.runs.folder:RunFolder.append_metrics", steps, signal.SIGKILL)
        done = fork_server.run(*arguments, signal_after=moment)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (run.path / "summary.json").exists()

    return kill


class TestStages:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        return train(small(STAGES), tmp_path_factory.mktemp("whole") / "run", console=QUIET)

    def test_each_continues_from_the_one_before(self, whole):
        names = sorted(p.name for p in (whole.path / "stages").iterdir())
        assert names == ["1-sft", "2-gft", "3-grpo"]
        sft, gft, grpo = (RunFolder(whole.path / "stages" / name) for name in names)
        for before, after in ((sft, gft), (gft, grpo)):
            recipe = Recipe.load(after.path / "recipe.yaml")
            assert recipe.policy.adapter == str(before.adapter.resolve())
            assert not all(torch.equal(v, weights(after)[k]) for k, v in weights(before).items())
        assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(grpo).items())

    def test_a_stage_brings_its_methods_group_loss_and_rate(self, whole):
        sft, gft, grpo = (small(STAGES).stage(i) for i in range(3))
        assert (sft.group.expert, sft.group.size, sft.optim.lr) == (1, 1, 1e-2)
        assert (gft.group.size, gft.optim.lr, gft.train.steps) == (8, 2e-3, 2)
        assert (grpo.group.self, grpo.objective.reduction) == (8, "sequence_mean")
        assert grpo.train.steps == 3
        assert grpo.reward == gft.reward == sft.reward
        psft = small("stages=[psft, gft]", "train.problems_per_step=8")
        assert [psft.stage(i).train.updates_per_rollout for i in (0, 1)] == [8, 1]

    def test_the_reference_is_the_base_or_the_stages_start(self, whole):
        by_stage = whole.summary()["stages"]
        # Against its own start, GRPO has moved less than SFT and GFT have from the base.
        assert 0 <= by_stage[2]["kl"] < by_stage[1]["kl"]
        recipes = [Recipe.load(p / "recipe.yaml") for p in
                   sorted((whole.path / "stages").iterdir())]  # fmt: skip
        assert [r.policy.reference for r in recipes] == ["base", "base", "adapter"]

    def test_the_summary_spans_all_stages(self, whole):
        summary = whole.summary()
        assert summary["method"] == "sft > gft > grpo"
        assert summary["steps"] == 7
        assert [(m["stage"], m["step"]) for m in whole.metrics()] == [
            (1, 1), (1, 2), (2, 1), (2, 2), *((3, step) for step in range(1, 4)),
        ]  # fmt: skip
        parts = [RunFolder(p) for p in sorted((whole.path / "stages").iterdir())]
        assert summary["base"] == parts[0].summary()["base"]
        assert parts[2].summary()["base"] == summary["base"]
        assert summary["trained"] == parts[2].summary()["trained"]
        # Each stage has its evaluations; its steps count from 1, and the base of all is step 0.
        assert [list(part.step_evaluations()) for part in parts] == [[0, 2], [0, 2], [0, 2, 3]]
        assert summary["guard"]["rollbacks"] == 0
        assert sum(summary["guard"]["alarms"].values()) == sum(
            len(m["guard"]["alarms"]) for m in whole.metrics() if "guard" in m
        )

    def test_a_run_killed_in_a_later_stage_resumes_to_the_same_end(
        self, whole, tmp_path, kill_after_a_step
    ):
        run = RunFolder(tmp_path / "run")
        kill_after_a_step(run, 4, STAGES)  # The second step of the second stage.
        assert len(RunFolder(run.path / "stages" / "2-gft").metrics()) == 2
        train(small(STAGES), run.path, resume=True, console=QUIET)
        assert all(torch.equal(v, weights(run)[k]) for k, v in weights(whole).items())
        assert [(m["stage"], m["step"], m["loss"]) for m in run.metrics()] == [
            (m["stage"], m["step"], m["loss"]) for m in whole.metrics()
        ]

    def test_a_wrong_stage_is_told_with_its_place(self, tmp_path):
        file = tmp_path / "recipe.yaml"
        file.write_text(
            "stages:\n- sft\n- method: gft\n  overrides:\n    objective: {tao: 1}\n"
            "- method: grpo\n  overrides: {group: {expert: 1}}\n"
        )
        with pytest.raises(RecipeError) as caught:
            Recipe.load(file)
        unknown, contradiction = caught.value.problems
        assert unknown.startswith(f"{file}:5: objective.tao: unknown field")
        assert unknown.endswith("(stage 2)")
        assert contradiction.startswith(f"{file}:7: group.expert: must be 0 with method grpo")
        with pytest.raises(
            RecipeError, match=r"stages.0.method: must be one of .*Did you mean gft"
        ):
            Recipe.from_tree({"stages": ["gtf"]})


class TestBudget:
    @pytest.mark.parametrize(
        ("budget", "steps"),
        [("{problems: 7}", 3), ("{problems: 6}", 2), ("{trajectories: 48}", 2),
         ("{trajectories: 49}", 3), ("{}", 2)],
    )  # fmt: skip
    def test_problems_and_trajectories_are_steps(self, budget, steps):
        assert small(f"budget={budget}").steps == steps

    def test_equal_trajectories_for_groups_and_single_rows(self):
        gft = small("budget={trajectories: 960}")
        sft = Recipe.load("recipes/lab_sft.yaml", ["budget={trajectories: 960}",
                                                   "train.problems_per_step=24"])  # fmt: skip
        assert gft.steps == sft.steps == 40

    def test_tokens_end_the_run_in_the_step_that_spends_them(self, tmp_path):
        run = train(small("budget={tokens: 1000}", "optim.schedule=linear"), tmp_path / "run",
                    console=QUIET)  # fmt: skip
        spent = [m["tokens"] for m in run.metrics()]
        assert sum(spent[:-1]) < 1000 <= sum(spent)
        rates = [m["lr"] for m in run.metrics()]
        assert rates[-1] < rates[1]

    def test_a_resumed_run_remembers_its_tokens(self, tmp_path, kill_after_a_step):
        recipe = small("budget={tokens: 1500}")
        whole = train(recipe, tmp_path / "whole", console=QUIET)
        part = RunFolder(tmp_path / "part")
        kill_after_a_step(part, 2, "budget={tokens: 1500}")
        assert len(whole.metrics()) > len(part.metrics()) == 2
        train(recipe, part.path, resume=True, console=QUIET)
        assert [m["tokens"] for m in part.metrics()] == [m["tokens"] for m in whole.metrics()]
        assert all(torch.equal(v, weights(part)[k]) for k, v in weights(whole).items())

    def test_seconds_end_the_run_in_the_step_that_spends_them_also_when_resumed(self, tmp_path):
        recipe = small("budget={seconds: 1}", "checkpoint.keep=1000", "optim.schedule=linear")
        run = train(recipe, tmp_path / "run", console=QUIET)
        whole = run.metrics()
        # As if the run had been killed after its first step.
        (run.path / "summary.json").unlink()
        for saved in (run.path / "checkpoints").iterdir():
            if saved.name != "step-000001":
                shutil.rmtree(saved)
        resumed = train(recipe, run.path, resume=True, console=QUIET).metrics()
        assert resumed[0] == whole[0]
        for metrics in (whole, resumed):
            spent = [training_seconds(m) for m in metrics]
            assert sum(spent[:-1]) < 1 <= sum(spent)
        assert recipe.steps is None

    def test_the_share_of_seconds_that_is_spent(self):
        """2 s and 4 s of 12 s are half; a third step is taken to last 3 s."""
        learner = Learner.__new__(Learner)
        learner.recipe, learner.step_seconds = small("budget={seconds: 12}"), [2.0, 4.0]
        assert [learner.budget_fraction(n) for n in (2, 2.5, 3)] == [0.5, 0.625, 0.75]
        learner.step_seconds = []
        assert [learner.budget_fraction(n) for n in (0, 0.5)] == [0, 0.01]
        # In the middle of the first step, a warm-up of a tenth has reached a tenth of the rate.
        assert learning_rate(0.01, OptimSettings(lr=1.0, warmup=0.1)) == pytest.approx(0.1)

    def test_one_kind_of_budget_at_a_time(self):
        with pytest.raises(RecipeError, match="budget: must name one of problems, traj"):
            small("budget={problems: 1, tokens: 2}")


class TestDynamicSampling:
    def test_flat_groups_are_replaced_as_often_as_allowed(self, tmp_path):
        overrides = ["method=grpo", "group={expert: 0, teacher: 0, self: 4}", "log.groups=true",
                     "train.problems_per_step=8"]  # fmt: skip
        plain = train(small(*overrides), tmp_path / "plain", console=QUIET)
        dynamic = train(small(*overrides, "rollout.resample=3"), tmp_path / "run", console=QUIET)
        before, after = plain.metrics()[0], dynamic.metrics()[0]
        assert before["flat_groups"] > 0
        assert after["flat_groups"] < before["flat_groups"]
        assert after["groups"] == before["groups"] == 8
        assert after["rollout_tokens"] > before["rollout_tokens"]
        # The groups that were of use stay, where they stood.
        for old, new in zip(plain.groups(1), dynamic.groups(1), strict=True):
            if len({r["reward"] for r in old["responses"]}) > 1:
                assert new == old
