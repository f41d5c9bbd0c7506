"""The study's rule, its choice of rates, its recipes and its page, from hand-made results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gft_lite.cli import main
from gft_lite.experiments.compare_methods import compare as compare_methods
from gft_lite.experiments.lab_study import (
    Design,
    Results,
    _Study,
    best_rate,
    setting_name,
    study,
)
from gft_lite.experiments.paper_findings import FINDINGS, RULE, Finding, compare, judge
from gft_lite.experiments.study_page import INTERPRETATION, write_page
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def runs(*values, figure="pass@1", base="lab"):
    """A setting's runs on one base, one a seed."""
    return {(base, seed): {figure: value} for seed, value in enumerate(values, start=1)}


class TestRule:
    def test_the_interval_is_of_paired_differences(self):
        """Differences .1, .2, .3: mean .2, deviation .1, t(2) = 4.302653."""
        found = compare({"a": runs(0.5, 0.8, 0.4), "b": runs(0.4, 0.6, 0.1)}, "a", "b", "pass@1")
        half = 4.302653 * 0.1 / 3**0.5
        assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))

    def test_runs_of_other_bases_and_seeds_are_no_pairs(self):
        a = {**runs(0.5, 0.7, 0.9), **runs(0.1, base="other")}
        found = compare({"a": a, "b": runs(0.4, 0.5)}, "a", "b", "pass@1")
        assert found.mean == pytest.approx(0.15)

    def test_no_comparison_without_two_pairs_or_without_the_figure(self):
        assert compare({"a": runs(1.0), "b": runs(0.0)}, "a", "b", "pass@1") is None
        assert compare({"a": runs(1.0, 0.5)}, "a", "b", "pass@1") is None
        both = {"a": runs(1.0, 0.5), "b": runs(1.0, 0.5)}
        assert compare(both, "a", "b", "pass@16") is None

    # Against .5 in every run: clearly above, clearly below, on both sides, exactly the same.
    ABOVE, BELOW, BOTH, SAME = (0.7, 0.71, 0.72), (0.3, 0.31, 0.32), (0.4, 0.5, 0.7), (0.5,) * 3

    @pytest.mark.parametrize(
        ("others", "lower", "verdict"),
        [
            ([BELOW], False, "reproduced"),
            ([ABOVE], False, "not reproduced"),
            ([BOTH], False, "undecided"),
            ([SAME], False, "undecided"),
            ([ABOVE], True, "reproduced"),
            ([BELOW], True, "not reproduced"),
            ([BELOW, BELOW], False, "reproduced"),
            ([BELOW, BOTH], False, "undecided"),
            ([BELOW, ABOVE], False, "not reproduced"),
            ([BOTH, ABOVE], False, "not reproduced"),
        ],
    )
    def test_the_verdict(self, others, lower, verdict):
        found = {"gft": runs(*self.SAME)}
        found |= {f"other {i}": runs(*values) for i, values in enumerate(others)}
        pairs = tuple(("gft", f"other {i}") for i in range(len(others)))
        finding = Finding("Table 0", "it wins", pairs, lower_is_better=lower)
        assert judge(finding, found)[0] == verdict

    def test_no_verdict_where_a_setting_was_not_run(self):
        finding = Finding("Table 0", "it wins", (("gft", "sft"), ("gft", "dft")))
        assert judge(finding, {"gft": runs(1.0, 1.0), "sft": runs(0.0, 0.1)}) is None


class TestDesign:
    def test_every_finding_is_about_settings_that_are_run(self):
        design = Design()
        run = {*design.methods, "ratio 4:4", "tau 0.7"}
        run |= {f"{a} > {b}" for a, b in design.stages}
        run |= {f"ratio {r}" for r in design.ratios} | {f"tau {t:g}" for t in design.taus}
        figures = {*(f"pass@{k}" for k in design.eval["k"]), *design.eval["sets"], "kl"}
        for finding in FINDINGS:
            assert {name for pair in finding.pairs for name in pair} <= run
            assert finding.figure in figures

    def test_at_least_five_runs_of_each_setting(self):
        assert len(Design().bases) * Design().seeds >= 5

    @pytest.mark.parametrize("method", Design().methods)
    def test_every_method_has_equal_trajectories(self, method):
        recipe = Recipe.load(f"recipes/study/{method}.yaml")
        size = recipe.group.size * recipe.train.problems_per_step
        assert size == (16 if method == "sft_few" else 128)
        assert recipe.method == ("sft" if method == "sft_few" else method)

    def test_methods_differ_in_nothing_else(self):
        trees = [Recipe.load(f"recipes/study/{m}.yaml").model_dump() for m in Design().methods]
        for tree in trees:
            for name in ("name", "method", "group", "objective"):
                del tree[name]
            del tree["optim"]["lr"], tree["train"]["problems_per_step"]
            del tree["train"]["updates_per_rollout"]
        assert all(tree == trees[0] for tree in trees)

    def test_the_best_rate_is_the_lower_of_equals(self):
        assert best_rate({4e-3: 0.5, 1e-3: 0.4, 2e-3: 0.5}) == 2e-3

    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"recipe": "gft"}, "gft"),
            ({"recipe": "sft_then_grpo"}, "sft > grpo"),
            ({"recipe": "gft", "group": "2:6"}, "ratio 2:6"),
            ({"recipe": "gft", "objective.tau": 0}, "tau 0"),
            ({"recipe": "gft", "objective.tau": 0.3}, "tau 0.3"),
        ],
    )
    def test_names_of_settings(self, settings, name):
        assert setting_name({**settings, "policy.model": "lab"}) == name

    def test_stages_share_the_steps_of_one_run_at_their_own_rates(self, tmp_path):
        work = _Study(tmp_path, Design(), 1, [], None)
        tuned = {"sft": work.write_tuned("sft", 5e-4), "grpo": work.write_tuned("grpo", 8e-3)}
        recipe = Recipe.load(work.write_staged(tuned, "sft", "grpo"))
        first, second = recipe.stage(0), recipe.stage(1)
        alone = Recipe.load(tuned["grpo"])
        assert first.train.steps + second.train.steps == alone.train.steps
        assert (first.method, first.optim.lr, first.train.problems_per_step) == ("sft", 5e-4, 128)
        assert (second.method, second.optim.lr) == ("grpo", 8e-3)
        assert (second.group, second.objective) == (alone.group, alone.objective)


@pytest.fixture
def results():
    """Two runs each of GFT and SFT; GFT is .2 and .3 better, and forgets .1 more in both."""

    def figures(pass_1, retention, kl):
        return {"pass@1": pass_1, "pass@16": 1.0, "retention": retention, "kl": kl}

    design = Design(methods=("gft", "sft"), bases=(0,), stages=(), ratios=(), taus=(0,),
                    eval={**Design().eval, "k": [1, 16]})  # fmt: skip
    return Results(
        design=design,
        recipe=Recipe.load("recipes/study/gft.yaml"),
        tuning={"gft": {1e-3: 0.25, 2e-3: 0.5}, "sft": {1e-3: 0.75, 5e-4: 0.125}},
        rates={"gft": 2e-3, "sft": 1e-3},
        runs={
            "base": {("lab", 1): figures(0.1, 1.0, 0.0), ("lab", 2): figures(0.1, 1.0, 0.0)},
            "gft": {("lab", 1): figures(0.5, 0.8, 0.3), ("lab", 2): figures(0.7, 0.7, 0.5)},
            "sft": {("lab", 1): figures(0.3, 0.9, 0.3), ("lab", 2): figures(0.4, 0.8, 0.1)},
        },
        sources={"gft": {"expert": 480, "teacher": 1440, "self": 1920}, "sft": {"expert": 3840}},
        costs={"main": {"cpu": 1200.4, "wall": 700.0}, "tau": {"cpu": 99.0, "wall": 60.0}},
        failed=["tau/tau=0,seed=1: no such luck"],
    )


class TestPage:
    def test_the_findings_that_were_run(self, results, tmp_path):
        """Differences .2 and .3: mean .25, t(1) = 12.7062, half .05 * 12.7062."""
        page = write_page(results, tmp_path / "page.md").read_text()
        assert (
            "| GFT is more accurate than SFT | Table 1 | gft - sft | pass@1 "
            "| +0.250 [-0.385, +0.885] | **undecided** |"
        ) in page
        assert (
            "| GFT keeps old skills better than SFT | Table 3 | gft - sft | retention "
            "| -0.100 [-0.100, -0.100] | **not reproduced** |"
        ) in page
        assert "than DFT" not in page
        assert "Of 4: 0 reproduced, 1 not reproduced, 3 undecided." in page
        assert RULE in page

    def test_figures_rates_costs_and_failures(self, results, tmp_path):
        page = write_page(results, tmp_path / "page.md").read_text()
        assert (
            "| gft | 0.002 | 480 | 1,440 | 1,920 | 0.600 [-0.671, 1.871] | 1.000 "
            "| 0.750 [0.115, 1.385] | 0.400 [-0.871, 1.671] |"
        ) in page
        assert "| base | - | - | - | - | 0.100 | 1.000 | 1.000 | 0.000 |" in page
        assert "| gft | - | 0.250 | **0.500** |" in page
        assert "| sft | 0.125 | **0.750** | - |" in page
        assert "| all | 1,299 | 760 |" in page
        assert "Failed: tau/tau=0,seed=1: no such luck" in page
        assert "| shipped (seed 0) | 0.100 | 0.350 | 0.600 |" in page

    def test_plots_lie_beside_it(self, results, tmp_path):
        page = write_page(results, tmp_path / "page.md").read_text()
        assert "(page/pass-at-k.svg)" in page
        assert "<svg" in (tmp_path / "page" / "pass-at-k.svg").read_text()

    def test_what_people_wrote_stays(self, results, tmp_path):
        file = write_page(results, tmp_path / "page.md")
        written = file.read_text() + f"\n{INTERPRETATION}\n\nIt is so.\n"
        file.write_text(written)
        results.runs["gft"]["lab", 1]["pass@1"] = 0.6
        again = write_page(results, file).read_text()
        assert again.endswith(f"{INTERPRETATION}\n\nIt is so.\n")
        assert "0.600 [-0.671" not in again
        assert write_page(results, file).read_text() == again

    def test_the_shipped_page_states_the_rule_and_every_finding(self):
        page = (ROOT / "examples" / "lab_study.md").read_text()
        assert RULE in page
        for finding in FINDINGS:
            assert f"| {finding.claim} | {finding.where} |" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": Design(seeds=0)}, "--seeds: must be at least 1, got 0."),
        ({"design": Design(seeds=10**9)}, "--seeds: must give at most 1,000 runs of the methods"),
        ({"jobs": 0}, "--jobs: must be at least 1, got 0."),
        ({"overrides": ["train.stepps=3"]}, "train.stepps: unknown field"),
        (
            {"overrides": ["reward.functions=[format]"]},
            "reward.functions: must have a rule that compares the answer, because methods are",
        ),
    ],
)
def test_wrong_options_are_errors_before_anything_runs(options, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        study(tmp_path / "study", **options)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gft,nonsense"], "--methods: nonsense: must be a recipe file"),
        (["train.stepps=3"], "train.stepps: unknown field"),
        (["--out", ""], "--out: must be a folder that can be written to, got ''."),
    ],
)
def test_a_comparison_is_checked_before_its_first_run(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["lab", "compare", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_does_not_mix_recipes(tmp_path):
    finished = tmp_path / "sft-0"
    finished.mkdir()
    (finished / "recipe.yaml").write_text(Recipe.load("recipes/lab_sft.yaml").to_yaml())
    (finished / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="--out: must be a new folder or one of the same recipes"):
        compare_methods(["sft"], 1, tmp_path, ["train.steps=3"])


def test_costs_add_up_over_starts(tmp_path):
    work = _Study(tmp_path, Design(), 1, [], None)
    lines = [{"part": "tune", "cpu": 2.0, "wall": 1.5}, {"part": "main", "cpu": 8.0, "wall": 4.0},
             {"part": "tune", "cpu": 3.0, "wall": 2.0}]  # fmt: skip
    (tmp_path / "costs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert work.costs() == {"tune": {"cpu": 5.0, "wall": 3.5}, "main": {"cpu": 8.0, "wall": 4.0}}
