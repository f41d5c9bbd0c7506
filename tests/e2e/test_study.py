"""A tiny study on the lab: every part really runs, once, on a base of its own too."""

from __future__ import annotations

import json
import shutil

import pytest
from rich.console import Console

from gft_lite import lab
from gft_lite.experiments.lab_study import FINAL_SETS, TUNE_SET, Design, study
from gft_lite.experiments.study_page import write_page
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError

SMALL = ["train.steps=1", "train.problems_per_step=2", "data.problems=40",
         "policy.quantization=none"]  # fmt: skip
DESIGN = Design(
    methods=("gft", "sft"),
    rates=(1e-3,),
    beyond=(1e-3, 2e-3),
    bases=(0, 1),
    seeds=1,
    stages=(),
    ratios=(),
    taus=(),
    tune_eval={"samples": 1, "k": [1], "sets": {"tune": {**TUNE_SET, "problems": 2}}},
    eval={
        "samples": 2,
        "k": [1, 2],
        "sets": {name: {**data, "problems": 2} for name, data in FINAL_SETS.items()},
    },
)


def run(out):
    return study(out, DESIGN, jobs=1, overrides=SMALL, console=Console(quiet=True))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    # Pretraining takes minutes: the shipped base stands in for the second one.
    shutil.copytree(lab.BASE, out / "bases" / "1")
    return out, run(out)


def trial(out, part, **settings):
    """The folder of a part's run."""
    for found in json.loads((out / part / "results.json").read_text())["trials"]:
        if settings.items() <= {**found["settings"], "seed": found["seed"]}.items():
            return out / part / found["folder"]
    raise LookupError(settings)


def test_figures_are_those_of_the_runs(done):
    out, results = done
    other = str(out / "bases" / "1")
    assert set(results.runs) == {"base", "gft", "sft", "ratio 4:4", "tau 0.7"}
    for method in ("gft", "sft"):
        assert set(results.runs[method]) == {("lab", 1), (other, 1)}
        for base in ("lab", other):
            folder = trial(out, "main", recipe=method, seed=1, **{"policy.model": base})
            summary = json.loads((folder / "summary.json").read_text())
            assert results.runs[method][base, 1] == summary["trained"]
            assert results.runs["base"][base, 1] == summary["base"]
            assert Recipe.load(folder / "recipe.yaml").policy.model == base
    assert results.failed == []
    assert results.sources == {"gft": {"expert": 2, "teacher": 6, "self": 8}, "sft": {"expert": 2}}


def test_rates_come_from_the_tune_split_and_the_rate_beyond_is_tried(done):
    out, results = done
    for method, scores in results.tuning.items():
        assert set(scores) == {1e-3, 2e-3}
        for part, rate in (("tune", 1e-3), ("tune-0.002", 2e-3)):
            found = []
            for base in ("lab", str(out / "bases" / "1")):
                folder = trial(out, part, recipe=method, **{"policy.model": base})
                recipe = Recipe.load(folder / "recipe.yaml")
                assert (recipe.optim.lr, recipe.seed) == (rate, 0)
                assert [s.split for s in recipe.eval.sets.values()] == ["tune"]
                summary = json.loads((folder / "summary.json").read_text())
                found.append(summary["trained"]["pass@1"])
            assert scores[rate] == sum(found) / 2
        assert Recipe.load(out / "recipes" / f"{method}.yaml").optim.lr == results.rates[method]


def test_done_is_done_and_the_page_comes_from_it(done, tmp_path):
    out, results = done
    again = run(out)
    assert (again.runs, again.rates, again.costs) == (results.runs, results.rates, results.costs)
    assert set(again.costs) == {"tune", "tune-0.002", "main"}
    assert all(cost["cpu"] > 0 for cost in again.costs.values())
    page = write_page(again, tmp_path / "page.md").read_text()
    assert "| GFT keeps old skills better than SFT | Table 3 |" in page


def test_another_study_is_kept_out(done):
    out, _ = done
    with pytest.raises(RecipeError, match="must be a new folder or one of the same recipe"):
        study(out, DESIGN, overrides=["train.steps=2"], console=Console(quiet=True))
