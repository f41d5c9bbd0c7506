"""The sweep's schema: grids, ratios, draws, names, what each mistake is told, and its figures."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from gft_lite.experiments.sweep_config import Sweep, grid_override
from gft_lite.experiments.sweep_results import other_recipe, results_by_settings, settings_figures
from gft_lite.experiments.sweep_runner import _Job, _next, _start
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import base_inputs
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import write_text_atomic
from gft_lite.utils.statistics import t_interval

MANY = ",".join(map(str, range(1, 101)))
LONG_FIELDS = (
    "policy.lora.rank", "policy.lora.alpha", "policy.threads", "data.max_prompt_tokens",
    "data.problems", "data.seed", "train.problems_per_step", "train.updates_per_rollout",
    "rollout.kv_cache_mib", "rollout.batch_size", "monitor.every", "monitor.problems",
)  # fmt: skip
FOUR_FIELDS = ("train.steps", "eval.samples", "monitor.every", "monitor.problems")


def plan(*overrides, grid=(), recipe="recipes/lab.yaml"):
    return Sweep.load(recipe, [*map(grid_override, grid), *overrides])


def errors(*overrides, **options):
    with pytest.raises(RecipeError) as caught:
        plan(*overrides, **options)
    return caught.value.problems


def names(sweep):
    return [trial.name for trial in sweep.trials()]


class TestGrid:
    def test_it_is_a_product_with_every_seed(self):
        made = plan("seeds=2", grid=["objective.tau=0,0.5", "optim.lr=1e-3,2e-3"])
        trials = made.trials()
        assert names(made)[:4] == ["tau=0,lr=0.001,seed=0", "tau=0,lr=0.001,seed=1",
                                   "tau=0,lr=0.002,seed=0", "tau=0,lr=0.002,seed=1"]  # fmt: skip
        assert [(t.recipe.objective.tau, t.recipe.optim.lr, t.recipe.seed) for t in trials] == [
            (tau, lr, seed) for tau in (0, 0.5) for lr in (1e-3, 2e-3) for seed in (0, 1)
        ]
        assert trials[0].settings == {"objective.tau": 0, "optim.lr": 0.001}
        # All that nobody asked to change is the recipe's own.
        assert trials[0].recipe == Recipe.load(
            "recipes/lab.yaml", ["objective.tau=0", "optim.lr=1e-3"]
        )

    def test_overrides_change_every_trial_and_seeds_count_from_the_recipes(self):
        made = plan("overrides.seed=5", "overrides.train.steps=3", "seeds=2", grid=["group.self=1"])
        assert [(t.recipe.seed, t.recipe.train.steps) for t in made.trials()] == [(5, 3), (6, 3)]

    def test_without_a_grid_there_are_the_seeds(self):
        assert names(plan("seeds=2")) == ["seed=0", "seed=1"]

    @pytest.mark.parametrize(
        ("recipe", "ratio", "group"),
        [
            ("lab.yaml", "8:0", (1, 7, 0)),
            ("lab.yaml", "1:3", (1, 0, 3)),
            ("lab.yaml", "0:8", (0, 0, 8)),
            ("paper/ratio/demo0_self8.yaml", "4:4", (1, 3, 4)),  # It has neither: as the paper.
            ("paper/ablations/no_mix.yaml", "6:2", (6, 0, 2)),  # It has experts only.
        ],
    )
    def test_a_ratio_is_demonstrations_to_self_samples(self, recipe, ratio, group):
        [trial] = plan(grid=[f"group={ratio}"], recipe=f"recipes/{recipe}").trials()
        made = trial.recipe.group
        assert (made.expert, made.teacher, made.self) == group
        assert trial.settings == {"group": ratio}
        assert trial.name == f"group={ratio.replace(':', '-')},seed=0"

    def test_ratios_are_the_papers_recipes(self):
        for trial in plan(recipe="recipes/sweeps/ratio.yaml").trials():
            demonstrations, own = trial.settings["group"].split(":")
            paper = Recipe.load(f"recipes/paper/ratio/demo{demonstrations}_self{own}.yaml").group
            # Without demonstrations no rule says what to do about missing ones.
            assert trial.recipe.group == paper.model_copy(update={"shortfall": "repeat"})
            assert demonstrations == "0" or paper.shortfall == "repeat"

    def test_values_may_be_recipes_sections_and_lists(self):
        made = plan(grid=["recipe=recipes/lab.yaml,recipes/lab_sft.yaml"])
        assert [(t.name, t.recipe.method) for t in made.trials()] == [
            ("recipe=lab,seed=0", "gft"), ("recipe=lab_sft,seed=0", "sft"),
        ]  # fmt: skip
        assert made.trials()[1].settings == {"recipe": "lab_sft"}
        made = plan(grid=["group={self: 2},{self: 3, expert: 0}", "rollout.stop=[a],[a b]"])
        assert [(t.recipe.group.self, t.recipe.rollout.stop) for t in made.trials()] == [
            (2, ["a"]), (2, ["a b"]), (3, ["a"]), (3, ["a b"]),
        ]  # fmt: skip
        assert len(set(names(made))) == 4
        assert all(re.fullmatch(r"[\w=,.-]+", name) for name in names(made))

    def test_equal_ends_of_fields_are_told_apart(self):
        made = plan(grid=["data.problems=40", "monitor.problems=4,5"])
        assert names(made)[0] == "data.problems=40,monitor.problems=4,seed=0"

    def test_a_long_name_is_shortened_and_stays_unique(self):
        made = names(plan("seeds=2", grid=[f"{field}=1" for field in LONG_FIELDS]))
        assert len(set(made)) == 2
        assert all(len(name) <= 207 and re.fullmatch(r"[\w=,.-]+", name) for name in made)


class TestRandom:
    def test_points_are_drawn_once_and_more_keep_the_earlier(self):
        grid = ["objective.tau=0,0.1,0.3,0.5,0.7,0.9,1", "group=8:0,4:4,0:8"]
        four, nine = (names(plan(f"random={n}", grid=grid)) for n in (4, 9))
        assert nine[:4] == four
        assert len(set(nine)) == 9
        assert set(nine) < set(names(plan(grid=grid)))
        assert names(plan("random=4", "random_seed=1", grid=grid)) != four

    def test_a_point_drawn_twice_is_drawn_again(self):
        """Two of the three values that four digits have between the bounds."""
        made = plan("random=3", grid=["optim.lr={uniform: [0.1, 0.1002]}"])
        assert {t.settings["optim.lr"] for t in made.trials()} == {0.1, 0.1001, 0.1002}

    def test_ranges(self):
        grid = ["optim.lr={log: [1e-4, 1e-2]}", "objective.tau={uniform: [0.5, 1]}"]
        made = plan("random=40", grid=grid)
        rates = [t.settings["optim.lr"] for t in made.trials()]
        assert 1e-4 <= min(rates) < 3e-4 < 3e-3 < max(rates) <= 1e-2
        assert 12 <= sum(rate < 1e-3 for rate in rates) <= 28  # Half of them, give or take.
        assert all(0.5 <= t.recipe.objective.tau <= 1 for t in made.trials())
        assert names(plan("random=41", grid=grid))[:40] == names(made)


class TestMistakes:
    def test_all_are_told_at_once_where_they_were_written(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text(
            "recipe: recipes/lab.yaml\noverrides: {optim: {lr: -1}}\n"
            "grid:\n  objective.tua: [1]\n  objective.tau: [0, -1]\nseeds: 3\n"
        )
        assert sorted(errors(recipe=file)) == [
            f"{file}:2: optim.lr: must be 'auto' or greater than 0, got -1.",
            f"{file}:4: objective.tua: unknown field, got 1. Did you mean objective.tau?",
            f"{file}:5: objective.tau: must be greater than or equal to 0, got -1.",
        ]

    @pytest.mark.parametrize(
        ("grid", "overrides", "told"),
        [
            (["group=6;2"], [], "group: must be demonstrations:self, such as 6:2, got '6;2'."),
            (["group=0:0"], [], "group.self: must be at least 1 when expert and teacher are 0"),
            (["seed=1,2"], [], "grid: must not have the field seed"),
            (["objective.tau=1,1"], [], "grid: must not have a point twice, got tau=1,seed=0."),
            (["objective.tau"], [], "--grid: must be field=value,value,..., got 'objective.tau'."),
            (["objective.tau=1"], ["random=2"], "random: must be at most 1, the points of"),
            (["optim.lr={log: [1, 2]}"], [], "random: must be the number of points to draw"),
            (["optim.lr={log: [0, 2]}"], ["random=2"], "log: must have bounds above 0"),
            (["recipe=1"], [], "grid: must have a list of files as `recipe`"),
            (["recipe=recipes/lap.yaml"], [], "Did you mean recipes/lab.yaml?"),
            ([], ["seeds=0"], "seeds: must be greater than 0, got 0."),
            ([], ["seeds=999999999"],
             "seeds: must give at most 1,000 runs, not 999,999,999 (points 1, seeds 999,999,999)"),
            (["optim.lr={log: [1e-4, 1]}"], ["random=1001"],
             "random: must give at most 1,000 runs, not 1,001"),
            ([f"{field}={MANY}" for field in FOUR_FIELDS], [],
             "grid: must give at most 1,000 runs, not 100,000,000"),
            ([f"{field}={MANY}" for field in FOUR_FIELDS], ["random=5"],
             "grid: must have at most 1,000,000 points to draw from, not 100,000,000"),
            (["optim.lr={uniform: [0.10001, 0.1001]}"], ["random=3"],
             "random: must be at most the 2 distinct points that were drawn, got 3."),
            (["optim.lr={uniform: [-1e308, 1e308]}"], ["random=3"],
             "uniform: must have bounds whose difference is finite"),
            ([], ["seeds=10", "overrides.seed=2147483640"],
             "seed: must be at most 2**31 - 10, got 2147483640."),
            (["group=6:2", "group.self=1"], [], "grid: must not have both group and group.self"),
            ([], ["overrides.stages=[gft, {method: sft, overrides: {optim: {lr: 0}}}]"],
             "optim.lr: must be 'auto' or greater than 0, got 0."),
        ],
    )  # fmt: skip
    def test_each_is_told(self, grid, overrides, told):
        assert told in "\n".join(errors(*overrides, grid=grid))

    def test_a_sweep_file_needs_a_recipe(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("grid: {objective.tau: [1]}\n")
        assert errors(recipe=file) == [f"{file}: recipe: is required, got nothing."]


def test_files_are_seen_from_the_sweeps_own_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("recipe: own.yaml\nseeds: 2\n")
    (tmp_path / "own.yaml").write_text("{extends: [recipes/lab.yaml], train: {steps: 7}}")
    made = Sweep.load(tmp_path / "mine.yaml")
    assert [t.recipe.train.steps for t in made.trials()] == [7, 7]
    # Those of the command line are seen from where it is typed.
    monkeypatch.chdir(tmp_path)
    typed = plan(grid=["recipe=own.yaml,recipes/lab_sft.yaml"])
    assert [t.recipe.train.steps for t in typed.trials()] == [7, 60]
    # What a sweep's folder keeps gives the same sweep again, from anywhere.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "sweep.yaml").write_text(made.to_yaml())
    assert Sweep.load(tmp_path / "elsewhere" / "sweep.yaml") == made


@pytest.mark.parametrize("name", ["tau", "ratio"])
def test_what_ships(name):
    made = Sweep.load(f"recipes/sweeps/{name}.yaml")
    assert made.name == name
    assert len(made.trials()) == {"tau": 21, "ratio": 15}[name]
    assert Sweep.from_tree(made.model_dump()) == made


def test_dry_run_lists_the_trials_and_loads_nothing_heavy():
    code = (
        "import sys; from gft_lite.cli import main; "
        "code = main(['sweep', 'recipes/sweeps/tau.yaml', 'optim.lr=1e-3', '--dry-run']); "
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("# tau=") == 21
    assert "lr: 0.001" in done.stdout


class TestBaseInputs:
    @pytest.mark.parametrize(
        "change",
        ["objective.tau=0.1", "group.self=2", "optim.lr=1", "policy.lora.rank=4", "train.steps=9",
         "rollout.temperature=0.5", "monitor.every=3", "name=other", "checkpoint.every=3"],
    )  # fmt: skip
    def test_what_only_training_reads_is_no_part(self, change):
        assert self.inputs(change) == self.inputs()

    @pytest.mark.parametrize(
        "change",
        ["seed=1", "eval.samples=8", "policy.quantization=none", "data.holdout=8", "data.seed=1",
         "rollout.max_tokens=16", "reward.functions=[math]", "monitor.problems=8",
         "rollout.engine=transformers"],
    )  # fmt: skip
    def test_what_the_base_or_its_samples_depend_on_is(self, change):
        assert self.inputs(change) != self.inputs()

    def test_without_a_holdout_the_groups_choose_the_problems_of_the_kl_set(self):
        assert self.inputs("data.holdout=0") != self.inputs("data.holdout=0", "group.teacher=2")

    @staticmethod
    def inputs(*overrides):
        return base_inputs(Recipe.load("recipes/lab.yaml", overrides))


class TestWhatTrialsShare:
    """The order of trials and the files they hand on, without training."""

    @pytest.fixture
    def work(self, tmp_path):
        def jobs(*overrides, grid=("objective.tau=0,0.5",)):
            trials = plan("seeds=2", *overrides, grid=grid).trials()
            return [_Job(trial, RunFolder(tmp_path / trial.name)) for trial in trials]

        return jobs

    @staticmethod
    def evaluate(job, text="{}"):
        for name in ("eval/base.json", "kl_set.json"):
            write_text_atomic(job.base_run.path / name, text)

    def test_who_has_the_same_base_waits_for_it(self, work):
        tau0_seed0, tau0_seed1, tau5_seed0, tau5_seed1 = jobs = work()
        order = []
        for _ in range(2):  # Of each seed one: the other's base is the same.
            order.append(_next(jobs))
            _start(order[-1], jobs)
        assert order == [tau0_seed0, tau0_seed1]
        assert _next(jobs) is None
        self.evaluate(tau0_seed1, "seed 1")
        assert _next(jobs) is tau5_seed1
        tau0_seed0.end("it broke", stopping=False)  # Without having evaluated its base.
        assert (tau0_seed0.state, tau0_seed0.reason) == ("failed", "it broke")
        assert _next(jobs) is tau5_seed0
        _start(tau5_seed1, jobs)
        for name in ("eval/base.json", "kl_set.json"):
            assert (tau5_seed1.run.path / name).read_text() == "seed 1"
        assert Recipe.load(tau5_seed1.run.path / "recipe.yaml") == tau5_seed1.trial.recipe

    def test_another_base_does_not_wait(self, work):
        jobs = work(grid=["eval.samples=8,16"])
        order = []
        while job := _next(jobs):
            _start(job, jobs)
            order.append((job.trial.recipe.seed, job.trial.recipe.eval.samples))
        assert order == [(0, 8), (0, 16), (1, 8), (1, 16)]
        assert not any(job.has_base for job in jobs)

    def test_of_a_staged_run_the_first_stage_has_the_base(self, work):
        jobs = work("overrides.stages=[sft, gft]")
        _start(jobs[0], jobs)
        self.evaluate(jobs[0])
        assert jobs[0].base_run.path == jobs[0].run.path / "stages" / "1-sft"
        _start(jobs[2], jobs)
        assert (jobs[2].run.path / "stages" / "1-sft" / "eval" / "base.json").exists()
        assert Recipe.load(jobs[2].base_run.path / "recipe.yaml").method == "sft"
        assert len(Recipe.load(jobs[2].run.path / "recipe.yaml").stages) == 2

    def test_an_interrupted_trial_is_no_failure(self, work):
        job = work()[0]
        job.end("its process was killed by SIGINT", stopping=True)
        assert (job.state, job.reason) == ("interrupted", None)
        write_text_atomic(job.run.path / "summary.json", "{}")
        job.end(None, stopping=True)
        assert job.state == "done"


def trial(tau, score, state="done"):
    summary = {"trained": {"pass@1": score}} if state == "done" else None
    return {"settings": {"objective.tau": tau}, "state": state, "summary": summary,
            "rectified": tau / 2 if state == "done" else None}  # fmt: skip


def test_figures_are_means_over_the_seeds_that_are_done():
    done = [trial(0, 0.2), trial(0, 0.4), trial(0, 0.6), trial(1, 0.5)]
    others = [trial(0, 0, "failed"), trial(1, 0, "interrupted"), trial(2, 0, "failed")]
    found = settings_figures([*done, *others])
    assert [(f["settings"]["objective.tau"], f["done"], f["failed"]) for f in found] == [
        (0, 3, 1), (1, 1, 0), (2, 0, 1),
    ]  # fmt: skip
    figure = found[0]["figures"]["pass@1"]
    assert figure["mean"] == pytest.approx(0.4)
    # t = 4.302653 with two degrees of freedom, the standard deviation is 0.2.
    assert figure["high"] == pytest.approx(0.4 + 4.302653 * 0.2 / 3**0.5)
    assert figure["low"] == pytest.approx(0.4 - 4.302653 * 0.2 / 3**0.5)
    assert found[1]["figures"]["pass@1"] == {"mean": 0.5, "low": None, "high": None}
    shown = results_by_settings({"name": "x", "interval": "t", "settings": found})
    assert shown.header == ("objective.tau", "done", "failed", "pass@1", "rectified")
    assert shown.rows[0] == ("0", "3", "1", "0.400 ±0.497", "0.000 ±0.000")
    assert shown.rows[1:] == (("1", "1", "0", "0.500", "0.500"), ("2", "0", "1", "-", "-"))


@pytest.mark.parametrize(
    # Quantiles from a printed table of Student's t, two-sided 95% (99% in the last).
    ("n", "level", "t"),
    [(2, 0.95, 12.7062), (3, 0.95, 4.3027), (4, 0.95, 3.1824), (5, 0.95, 2.7764),
     (11, 0.95, 2.2281), (31, 0.95, 2.0423), (10, 0.99, 3.2498)],
)  # fmt: skip
def test_student_intervals(n, level, t):
    values = list(range(n))
    low, high = t_interval(values, level=level)
    deviation = (sum((v - (n - 1) / 2) ** 2 for v in values) / (n - 1)) ** 0.5
    assert (high - low) / 2 == pytest.approx(t * deviation / n**0.5, rel=3e-5)
    assert (high + low) / 2 == pytest.approx((n - 1) / 2)


def test_an_interval_needs_two_values():
    with pytest.raises(ValueError, match="at least two, got 1"):
        t_interval([1.0])


def test_a_folder_with_another_recipe_is_found_by_what_has_an_effect(tmp_path):
    run = RunFolder(tmp_path)
    recipe = Recipe.load("recipes/lab.yaml")
    assert other_recipe(run, recipe) is None
    run.create(recipe.to_yaml())
    assert other_recipe(run, recipe) is None
    faster = Recipe.load("recipes/lab.yaml", ["train.micro_batch_tokens=64"])
    assert other_recipe(run, faster) is None
    other = Recipe.load("recipes/lab.yaml", ["optim.lr=1e-3"])
    assert other_recipe(run, other) == tmp_path / "recipe.yaml"
