"""The referee's plan by hand: recipes, budgets, rates, dials, what is tuned on, wrong options."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest

from gft_lite.cli import main
from gft_lite.experiments.referee import Trial, _Referee
from gft_lite.experiments.referee_costs import failed_before, method_table, plan_lines, power
from gft_lite.experiments.referee_data import check_data
from gft_lite.experiments.referee_folder import check_same_plan
from gft_lite.experiments.referee_plan import RefereeOptions, make_plan
from gft_lite.experiments.tuning import best_rate, further_rates, geometric_rates
from gft_lite.objective.methods import METHODS
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import UserError

LAB = "recipes/lab.yaml"  # GFT, 60 steps of 16 problems with 1 + 3 + 4 responses.


def plan_of(methods="gft,sft", overrides=(), recipe=LAB, **options):
    return make_plan(RefereeOptions(recipe, tuple(methods.split(",")), tuple(overrides), **options))


def recipe_of(plan, name, part="main", **settings):
    settings = {field.replace("__", "."): value for field, value in settings.items()}
    return Recipe.from_tree(plan.tree(name, plan.example_settings(name) | settings, part))


class TestRates:
    def test_a_geometric_grid_around_the_center(self):
        assert geometric_rates(2e-3, 1) == (2e-3,)
        assert geometric_rates(2e-3, 3) == (1e-3, 2e-3, 4e-3)
        assert geometric_rates(2e-3, 4) == (1e-3, 2e-3, 4e-3, 8e-3)
        assert geometric_rates(2e-3, 5) == (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
        assert geometric_rates(1e-3 / 3, 1) == (3.333e-4,)

    def test_further_rates_are_beyond_an_end_or_on_both_sides(self):
        rates = (1e-3, 2e-3, 4e-3)
        assert further_rates(rates, 4e-3) == (8e-3, 1.6e-2)
        assert further_rates(rates, 1e-3) == (5e-4, 2.5e-4)
        assert further_rates(rates, 2e-3) == (1.414e-3, 2.828e-3)

    def test_the_best_rate_is_the_lower_of_equals(self):
        assert best_rate({4e-3: 0.5, 1e-3: 0.4, 2e-3: 0.5}) == 2e-3


class TestDials:
    @pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.dial])
    def test_every_value_is_one_that_the_recipe_accepts_and_two_are_new(self, name):
        method = METHODS[name]
        assert method.dial.parameter in method.parameters
        for value in method.dial.values:
            recipe = Recipe.from_tree({"method": name, "objective": {method.dial.parameter: value}})
            assert recipe.objective.model_dump()[method.dial.parameter] == value
        assert len(plan_of(f"{name},sft").dial_values(name)) == 2

    def test_the_end_of_a_constant_schedule_follows_its_dial(self, tmp_path):
        plan, moved = plan_of("chord,sft"), {"objective.mu": 0.3, "objective.mu_end": 0.3}
        assert plan.dial_values("chord") == [0.3, 0.5]
        assert plan.dial_settings("chord", 0.3) == moved
        trials = _Referee(plan, tmp_path, None)._further("chord", {"optim.lr": 1e-3})
        assert trials[0] == Trial("chord", "objective.mu", {"optim.lr": 1e-3, **moved})
        falling = plan_of("chord,sft", ["objective={mu: 0.9, mu_end: 0.05}", "method=chord"])
        assert falling.dial_settings("chord", 0.3) == {"objective.mu": 0.3}

    def test_the_values_beside_the_recipes_own(self):
        assert plan_of().dial_values("gft") == [0.1, 0.3]
        assert plan_of(overrides=["objective.tau=0.1"]).dial_values("gft") == [0.3, 0.7]
        assert plan_of(overrides=["objective.tau=0.5"]).dial_values("gft") == [0.1, 0.3]
        assert plan_of().dial_values("sft") == []


class TestRecipes:
    def test_each_method_has_its_own_group_loss_and_updates(self):
        plan = plan_of("gft,sft,grpo,psft,luffy", ["group.self=12", "optim.warmup=0.3"])
        gft, sft, grpo, psft, luffy = (recipe_of(plan, name) for name in plan.methods)
        assert (gft.group.self, gft.objective.model_dump()["tau"]) == (12, 0.7)
        assert (sft.group.expert, sft.group.size, sft.group.shortfall) == (1, 1, "drop")
        assert (grpo.group.self, grpo.objective.reduction) == (8, "sequence_mean")
        assert (psft.train.updates_per_rollout, gft.train.updates_per_rollout) == (8, 1)
        assert luffy.objective.model_dump()["gamma"] == 0.1
        for recipe in (gft, sft, grpo, psft, luffy):
            assert (recipe.optim.lr, recipe.optim.warmup) == (2e-3, 0.3)

    def test_equal_trajectories_a_run_and_nearly_equal_ones_a_step(self):
        plan = plan_of("gft,sft,chord,grpo")
        assert plan.budget == 60 * 16 * 8
        assert [plan.problems_per_step(n) for n in plan.methods] == [16, 128, 14, 16]
        # chord's groups have 1 + 8: 61 steps of 126 responses are the first over 7,680.
        assert [plan.trajectories(n) for n in plan.methods] == [7680, 7680, 7686, 7680]
        assert recipe_of(plan, "chord").steps == 61
        assert recipe_of(plan_of(budget=1000), "sft").steps == 8

    def test_tokens_and_seconds_are_budgets_of_the_run(self):
        plan = plan_of(equal="tokens", budget=5000)
        assert recipe_of(plan, "sft").budget.model_dump(exclude_none=True) == {"tokens": 5000}
        plan = plan_of("sft+grpo,gft", ["budget={seconds: 0.5}"], equal="seconds")
        staged = recipe_of(plan, "sft+grpo")
        assert [staged.stage(i).budget.seconds for i in (0, 1)] == [0.25, 0.25]
        assert plan.trajectories("gft") is None

    def test_stages_share_the_budget_at_their_own_settings(self):
        plan = plan_of("gft,psft+gft", budget=1001)
        chosen = {"psft": {"optim.lr": 5e-4, "objective.clip_high": 0.4},
                  "gft": {"optim.lr": 8e-3, "objective.tau": 0.1}}  # fmt: skip
        settings = plan.staged_settings("psft+gft", chosen)
        assert settings == {"stages.0.optim.lr": 5e-4, "stages.0.objective.clip_high": 0.4,
                            "optim.lr": 8e-3, "objective.tau": 0.1}  # fmt: skip
        recipe = Recipe.from_tree(plan.tree("psft+gft", settings, "main"))
        first, second = recipe.stage(0), recipe.stage(1)
        assert (first.method, first.optim.lr, first.objective.clip_high) == ("psft", 5e-4, 0.4)
        assert (second.method, second.optim.lr, second.objective.tau) == ("gft", 8e-3, 0.1)
        assert [r.budget.trajectories for r in (first, second)] == [500, 501]
        assert (first.train.problems_per_step, first.train.updates_per_rollout) == (128, 8)
        assert (second.train.problems_per_step, second.train.updates_per_rollout) == (16, 1)
        alone = recipe_of(plan, "gft", objective__tau=0.1)
        assert (second.group, second.objective) == (alone.group, alone.objective)
        assert plan.stem("psft+gft", settings) == "psft+gft_lr0.0005_clip_high0.4_lr0.008_tau0.1"

    def test_methods_differ_in_nothing_else(self):
        plan = plan_of("gft,sft,grpo,luffy,sft_mix")
        for part in ("tune", "main"):
            trees = [recipe_of(plan, name, part).model_dump() for name in plan.methods]
            for tree in trees:
                del tree["method"], tree["group"], tree["objective"], tree["train"]
            assert all(tree == trees[0] for tree in trees)

    def test_a_file_is_a_method_of_its_name(self, tmp_path):
        file = tmp_path / "gft_low.yaml"
        file.write_text("method: gft\nobjective: {tau: 0.1}\ngroup: {self: 6}\n")
        plan = plan_of(f"gft,{file},configs/methods/luffy.yaml")
        assert plan.methods == ("gft", "gft_low", "luffy")
        low = recipe_of(plan, "gft_low")
        assert (low.group.size, low.objective.tau, plan.dial_values("gft_low")) == (
            10, 0.1, [0.3, 0.7],
        )  # fmt: skip
        assert plan.problems_per_step("gft_low") == 13
        file.write_text("objective: {tau: 0.1}\neval: {samples: 3}\n")
        with pytest.raises(UserError, match=r"differ from the recipe only in .*, got eval\."):
            plan_of(f"gft,{file}")

    def test_a_method_of_the_users_own(self, tmp_path, monkeypatch):
        (tmp_path / "own_method.py").write_text(
            "from gft_lite.objective.losses import LossOutput\n"
            "from gft_lite.objective.methods import Dial, Method\n"
            "def loss(inputs, *, power: float = 1.0):\n"
            "    return LossOutput(-inputs.logprobs * power)\n"
            "METHOD = Method(loss, ('expert',), 'mine', group_advantages=False,\n"
            "    dial=Dial('power', (0.5, 1.0, 2.0)),\n"
            "    defaults={'group': {'expert': 1, 'teacher': 0, 'self': 0, 'shortfall': 'drop'}})\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        plan = plan_of("own_method:METHOD,gft", against="gft")
        assert plan.dial_values("own_method:METHOD") == [0.5, 2.0]
        assert plan.problems_per_step("own_method:METHOD") == 128
        settings = plan.example_settings("own_method:METHOD")
        assert plan.stem("own_method:METHOD", settings) == "own_method-METHOD_lr0.002_power1"

    def test_the_base_a_teacher_is_one_only_where_the_recipe_has_it(self):
        with pytest.raises(UserError, match=r"--methods: opd: teacher\.model: must be another"):
            plan_of("gft,opd")
        plan = plan_of("gft,opd,sdft", ["teacher.model=some/model"])
        assert recipe_of(plan, "opd").teacher.model == "some/model"
        assert recipe_of(plan, "sdft").teacher.model == "average"


class TestSets:
    def test_the_lab_has_a_split_for_tuning(self):
        plan = plan_of()
        tune, compared = recipe_of(plan, "sft", "tune"), recipe_of(plan, "sft")
        assert [(n, s.split, s.problems) for n, s in tune.eval.sets.items()] == [
            ("tune", "tune", 64)
        ]
        assert (tune.seed, tune.eval.samples, tune.eval.k, tune.monitor.every) == (0, 4, [1], 0)
        assert (compared.seed, compared.eval) == (1, Recipe.load(LAB).eval)

    def test_the_best_checkpoint_is_one_by_the_compared_sets(self):
        best = ["eval.every=5", "checkpoint.best={metric: test/pass@1}", "checkpoint.adapter=best"]
        plan = plan_of(overrides=best)
        tune, compared = recipe_of(plan, "sft", "tune"), recipe_of(plan, "sft")
        assert (tune.checkpoint.adapter, tune.checkpoint.best) == ("last", None)
        assert compared.checkpoint.best.metric == "test/pass@1"
        assert (tune.eval.every, compared.eval.every) == (0, 5)

    def test_one_of_the_recipes_sets_is_for_tuning_only(self):
        plan = plan_of(overrides=["eval.sets.dev={source: lab, split: tune}"], tune_set="dev")
        assert list(plan.sets) == ["test", "retention"]
        assert recipe_of(plan, "gft", "tune").eval.sets["tune"].split == "tune"

    @pytest.fixture
    def own_data(self, tmp_path):
        """Thirty problems; the last is a copy of the third."""
        names = [f"{i}+{i}=" for i in range(29)]
        rows = [{"problem": n, "answer": "1", "expert": "#1"} for n in [*names, " 2+2= "]]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (tmp_path / "test.jsonl").write_text(json.dumps({**rows[25], "problem": "1+2="}) + "\n")
        columns = "columns: {expert: [expert]}"
        (tmp_path / "r.yaml").write_text(
            f"extends: [{Path(LAB).resolve()}]\n"
            f"data: {{source: {tmp_path}/train.jsonl, {columns}, shuffle: false, holdout: 3}}\n"
            f"eval: {{sets: {{test: {{source: {tmp_path}/test.jsonl}}}}}}\n"
        )
        return tmp_path

    def test_problems_of_the_training_data_are_kept_for_tuning(self, own_data):
        """A fifth of 30: the runs skip the 6 problems of the tuning set, and the copy of one."""
        plan = plan_of(recipe=str(own_data / "r.yaml"))
        tune, compared = recipe_of(plan, "sft", "tune"), recipe_of(plan, "sft")
        assert tune.eval.sets["tune"].problems == 6
        assert tune.data == compared.data
        assert (compared.data.skip, tune.eval.sets["tune"].skip) == (6, 0)
        check_data(plan)

    def test_a_set_that_shares_problems_with_the_tuning_set_is_an_error(self, own_data):
        overrides = [f"eval.sets.dev={{source: {own_data}/train.jsonl, skip: 24, shuffle: false}}"]
        plan = plan_of(recipe=str(own_data / "r.yaml"), overrides=overrides, tune_set="dev")
        with pytest.raises(UserError, match=r"data: must have no problem .* got 5 of them"):
            check_data(plan)

    def test_wrong_sets(self):
        sets = "eval.sets.test={source: lab, split: tune, problems: 9}"
        with pytest.raises(UserError, match=r"eval\.sets\.test: must have other problems than"):
            plan_of(overrides=[sets])
        with pytest.raises(UserError, match=r"--tune-set: must be one of .* test, retention, got"):
            plan_of(tune_set="dev")
        with pytest.raises(UserError, match=r"eval\.sets: must have a set of problems to compare"):
            plan_of(recipe="recipes/study/gft.yaml")


class TestChoice:
    @pytest.fixture
    def work(self, tmp_path):
        """A referee whose runs have the scores of `self.known`, without running any."""

        class Work(_Referee):
            known: ClassVar = {}

            def run_part(self, part, runs):
                stems = [self.plan.stem(name, settings) for name, settings in runs]
                return [
                    {"settings": {"recipe": stem}, "summary": {"trained": {"pass@1": score}}
                     if (score := self.known.get(stem, 0.1)) is not None else None}
                    for stem in stems
                ]  # fmt: skip

        return lambda methods, **options: Work(plan_of(methods, **options), tmp_path, None)

    def test_the_dial_at_the_best_rate_or_further_rates(self, work):
        referee = work("gft,sft")
        referee.known = {"gft_lr0.002_tau0.7": 0.5, "gft_lr0.002_tau0.3": 0.6,
                         "sft_lr0.004": 0.5, "sft_lr0.008": 0.5}  # fmt: skip
        chosen = referee.tune()
        assert chosen == {"gft": {"optim.lr": 2e-3, "objective.tau": 0.3},
                          "sft": {"optim.lr": 4e-3}}  # fmt: skip
        assert len(referee.trials) == referee.plan.runs["tune"] == 2 * (3 + 2)
        assert Trial("sft", "optim.lr", {"optim.lr": 1.6e-2}) in referee.trials
        points = referee.tuning_points(chosen)
        assert {p.method: p.settings for p in points if p.chosen} == chosen
        assert {p.field for p in points if p.method == "gft"} == {"optim.lr", "objective.tau"}

    def test_stages_have_the_chosen_settings_of_each_and_their_own_last_rate(self, work):
        referee = work("gft,sft+grpo")
        referee.known = {"sft_lr0.001": 0.5, "grpo_lr0.002": 0.5, "gft_lr0.001_tau0.7": 0.5,
                         "sft+grpo_lr0.001_lr0.001": 0.9}  # fmt: skip
        chosen = referee.tune()
        assert chosen["sft+grpo"] == {"stages.0.optim.lr": 1e-3, "optim.lr": 1e-3}
        tried = [t.settings["optim.lr"] for t in referee.trials if t.method == "sft+grpo"]
        assert tried == [1e-3, 2e-3, 4e-3]
        assert referee.plan.runs == {"tune": 3 * 5 + 3, "main": 2 * 5}

    def test_a_method_without_a_finished_run_leaves_the_others(self, work):
        referee = work("gft,sft,sft+grpo")
        referee.known = {f"sft_lr{rate:g}": None for rate in (1e-3, 2e-3, 4e-3)}
        chosen = referee.tune()
        assert set(chosen) == {"gft", "grpo"}

    def test_without_tuning_all_have_the_recipes_rate(self, work):
        referee = work("gft,sft+grpo", tune=1)
        assert referee.tune()["sft+grpo"] == {"stages.0.optim.lr": 2e-3, "optim.lr": 2e-3}
        assert referee.trials == [] and referee.plan.runs["tune"] == 0


class TestFolder:
    def test_more_seeds_methods_and_bases_are_the_same_comparison(self, tmp_path):
        check_same_plan(plan_of(), tmp_path)
        check_same_plan(plan_of("gft,sft,grpo", seeds=6, bases=("lab", "lab:1")), tmp_path)
        with pytest.raises(UserError) as caught:
            check_same_plan(plan_of("gft,sft", tune=5, overrides=["optim.warmup=0.2"]), tmp_path)
        assert str(caught.value) == (
            "--out: must be a new folder or one of the same comparison, got another in "
            f"{tmp_path}: --tune 3, now 5, --seeds 6, now 5, --methods with grpo, now without and "
            "2 more. Choose another folder."
        )

    def test_the_rules_of_the_verdict_are_fixed(self, tmp_path):
        check_same_plan(plan_of(), tmp_path)
        for options in ({"margin": 0.02}, {"against": "sft"}):
            with pytest.raises(UserError, match=f"--{next(iter(options))} .*, now "):
                check_same_plan(plan_of(**options), tmp_path)

    def test_what_runs_were_tuned_on_stays_the_same(self, tmp_path):
        (tmp_path / "low.yaml").write_text("objective: {tau: 0.1}\n")
        methods = f"gft,{tmp_path / 'low.yaml'}"
        same = {"overrides": ["eval.sets.dev={source: lab, split: tune, skip: 99}"],
                "bases": ("lab", "lab:1")}  # fmt: skip
        check_same_plan(plan_of(methods, **same), tmp_path)
        (tmp_path / "low.yaml").write_text("objective: {tau: 0.2}\n")
        changed = plan_of(methods, **same | {"bases": ("lab:1", "lab")}, tune_set="dev")
        with pytest.raises(UserError) as caught:
            check_same_plan(changed, tmp_path)
        found = "--bases lab first, now lab:1, other settings of low, another tuning set. Choose"
        assert found in str(caught.value)

    def test_a_damaged_plan_is_one_line(self, tmp_path):
        (tmp_path / "plan.json").write_text("[1]")
        with pytest.raises(UserError, match=r"plan\.json: must be the plan of a referee"):
            check_same_plan(plan_of(), tmp_path)


class TestPrinted:
    def test_the_plan_has_runs_budgets_disk_and_the_time_of_finished_runs(self, tmp_path):
        plan = plan_of("gft,sft,sft+grpo", bases=("lab", "lab:1"), seeds=4)
        table = method_table(plan)
        rows = {row[0]: row[1:] for row in table.rows}
        assert rows["gft"] == ("1+3+4", "16", "60", "7,680", "tau 0.1, 0.3", "5", "8")
        assert rows["sft+grpo"] == ("1+0+0 > 0+0+8", "128 > 16", "30 > 30", "7,680", "-", "3", "8")
        assert rows["grpo"][-1] == "0"
        lines = plan_lines(plan, tmp_path)
        assert "runs: 18 to tune, 24 to compare" in lines
        assert "time: not known before the first run is finished" in lines
        for part, name, seconds in (("tune", "a", 10), ("tune", "b", 20), ("main", "c", 100)):
            folder = tmp_path / part / "trials" / name
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps({"seconds": {"total": seconds}}))
        # 16 runs of 15 s and 23 of 100 s: 2,540 s.
        assert "time: about 42 min 20 s of runs are left (by 3 finished runs), one at a time" in (
            plan_lines(plan, tmp_path)
        )
        assert "pretraining: the lab's bases of the seeds 1, minutes each" in lines
        assert f"finished: 3 of 42 runs in {tmp_path}" in plan_lines(plan, tmp_path)

    def test_the_disk_is_that_of_the_adapter_and_of_the_checkpoints_with_two_moments(self):
        """A checkpoint is three adapters: with 2 and 5 of them there are 7 and 16."""
        sizes = []
        for keep in (2, 5):
            plan = plan_of(overrides=[f"checkpoint.keep={keep}"], seeds=400)
            [text] = re.findall(
                r"disk: at most ([\d.]+) GiB", "\n".join(plan_lines(plan, Path("x")))
            )
            sizes.append(float(text))
        assert sizes[1] / sizes[0] == pytest.approx(16 / 7, rel=5e-3)

    def test_the_plan_says_which_differences_it_finds(self):
        """Two methods, 100 problems: t is 2.776 with 4 degrees of freedom and 1.984 with 99.

        For power .9 the noncentrality is 4.396 and 3.273: the root of (4.396 * .04 / 5**.5)**2 +
        (3.273 * .02)**2 is .1023.
        """
        plan = plan_of(overrides=["eval.sets.test.problems=100"])
        text = power(plan)
        assert text.startswith("with 5 seeds, differences of about 10.2 points are found 4 times")
        # Of three methods, each of two comparisons is tested at .025.
        three = plan_of("gft,sft,grpo", ["eval.sets.test.problems=100"])
        assert "about 11.9 points" in power(three)
        of_bases = power(plan_of(bases=("lab", "lab:1"), overrides=["eval.sets.test.problems=100"]))
        assert of_bases.startswith("with 2 bases (a base counts once, however many seeds it has), ")
        assert "with one run of each method, other seeds are not covered" in power(plan_of(seeds=1))
        assert f"power: {text}" in plan_lines(plan, Path("nowhere"))

    def test_runs_that_failed_before_are_said(self, tmp_path):
        plan = plan_of()
        assert failed_before(plan, tmp_path) is None
        (tmp_path / "tune").mkdir()
        trials = [
            {"name": name, "seed": 0, "state": state, "reason": "", "folder": f"trials/{name}",
             "summary": None, "settings": {}}
            for name, state in (("a", "failed"), ("b", "done"), ("c", "failed"))
        ]  # fmt: skip
        results = {"trials": trials, "settings": [], "interval": 0.95}
        (tmp_path / "tune" / "results.json").write_text(json.dumps(results))
        text = failed_before(plan, tmp_path)
        assert text.startswith("failed before: tune/trials/a and 1 more; run again, from the last ")
        assert text in plan_lines(plan, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods gft,stf", "--methods: must be methods, files or dotted paths, got 'stf'. Did "
         "you mean sft?"),
        ("--methods gft", "--methods: must be at least 2 methods, got gft."),
        ("--methods gft,gft", "--methods: must not name a method twice, got gft."),
        ("--methods gft,sft+", "--methods: must be methods, files or dotted paths, got ''."),
        ("--methods gft,no_such:METHOD", "--methods: module must be importable"),
        ("--methods gft,sft --against grpo", "--against: must be one of --methods, gft, sft, got"),
        ("--methods gft,sft --margin 1", "--margin: must be between 0 and 1"),
        ("--methods gft,sft --margin 0", "--margin: must be between 0 and 1"),
        ("--methods gft,sft --tune 0", "--tune: must be a whole number from 1"),
        ("--methods gft,sft --equal words", "--equal: must be one of trajectories, tokens, seco"),
        ("--methods gft,sft --equal tokens", "--budget: must be the tokens of a run, which the "),
        ("--methods gft,sft --bases lab,lab", "--bases: must not name a model twice"),
        ("--methods gft,sft --bases lab,no/where/x", "policy.model: must be the folder of a base"),
        ("--methods gft,sft optim.lrr=1", "command line: optim.lrr: unknown field"),
        ("--methods gft,sft eval.every=5 early_stop.patience=2", "early_stop.patience: must be"),
        ("--methods gft,sft guard.action=rollback", "guard.action: must be none or warn, as "
         "methods are compared at equal budgets, got rollback. Leave it out."),
        ("--methods gft,sft reward.functions=[format]", "reward.functions: must have a rule that"),
        ("--methods gft,psft train.problems_per_step=1 group.teacher=0 group.self=1",
         "--methods: psft: train.updates_per_rollout: must be at most"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line_before_anything_runs(options, message, tmp_path, capsys):
    assert main(["referee", LAB, *options.split(), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert re.match(re.escape(message), errors), errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()
