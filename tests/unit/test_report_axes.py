"""The data of the report's charts by hand: axes, gaps, headline figures, recipe values."""

from __future__ import annotations

import json

import pytest
from report_runs import evaluated, make_run, step

from gft_lite.report.charts import chart_of, value_range
from gft_lite.report.curves import BASE, NUMBER, SHARE, Curve, Plot
from gft_lite.report.group_browser import other_steps, select_steps
from gft_lite.report.headline import best_scores, best_step_of, changed_settings
from gft_lite.report.loading import read_folders
from gft_lite.report.summary import Estimate, Score


def curve(*y, **fields):
    return Curve("a", 0, range(len(y)), y, **fields)


@pytest.mark.parametrize(
    ("unit", "values", "expected"),
    [
        (SHARE, (0.2, 0.7), (0.175, 0.725)),  # 5% of the span above and below.
        (SHARE, (0.5, 0.51, None), (0.455, 0.555)),  # At least ten points.
        (SHARE, (0.0, 0.004), (0.0, 0.1)),
        (SHARE, (1.0, 0.999), (0.9, 1.0)),
        (SHARE, (-0.3, 1.4), (0.0, 1.0)),
        (SHARE, (float("nan"), None), (0.0, 0.1)),
        (NUMBER, (2.0, 2.1), (0.0, 2.205)),  # 0 is on the axis.
        (NUMBER, (-0.4, 0.6), (-0.45, 0.65)),
        (NUMBER, (-0.4,), (-0.42, 0.0)),
        (NUMBER, (3e-7,), (0.0, 1e-3)),  # Rounding errors are no trend.
        (NUMBER, (), (0.0, 1e-3)),
    ],
)
def test_axes_do_not_make_a_trend_of_noise(unit, values, expected):
    assert value_range([curve(*values)], unit) == pytest.approx(expected)


def test_axes_have_space_for_the_ranges_of_all_curves():
    wide = curve(0.5, low=(0.1,), high=(0.9,))
    assert value_range([wide, curve(0.6)], SHARE) == pytest.approx((0.06, 0.94))
    assert value_range([curve(0.5)], SHARE, from_zero=True) == pytest.approx((0.0, 0.525))


def test_a_chart_is_json_in_which_unknown_values_are_gaps():
    line = Curve("</script>", 2, (1, 2, 3), (0.12345678, float("nan"), None), dash=1)
    base = Curve("base", BASE, (1,), (0.5,), rings=(0,))
    made = json.loads(json.dumps(chart_of(Plot("n", "t", "step", "y", (line, base)))))
    first, second = made["curves"]
    assert (first["label"], first["color"], first["dash"]) == ("</script>", 2, 1)
    assert (first["x"], first["y"], first["low"]) == ([1, 2, 3], [0.123457, None, None], None)
    assert (second["color"], second["rings"]) == (None, [0])
    assert made["second"] is None and made["range"] == pytest.approx([0, 0.525])
    assert chart_of(Plot("n", "t", "x", "y", (base,), scatter=True)) is None


def test_the_best_step_is_the_first_of_the_best(tmp_path):
    files = {f"step-{n:06d}": evaluated(right) for n, right in ((0, 1), (10, 3), (20, 3), (30, 2))}
    make_run(tmp_path / "run", **files)
    make_run(tmp_path / "none")
    [run, none] = read_folders([tmp_path / "run", tmp_path / "none"])[0]
    found = best_step_of(run)
    assert (found.step, found.name, found.value, found.unit) == (10, "test, pass@1", 0.75, SHARE)
    assert best_step_of(none) is None


def test_the_best_score_is_marked_only_where_there_is_another():
    def score(value):
        return Score(SHARE, None, None if value is None else Estimate(value))

    runs = [{"a": score(0.2), "b": score(0.5)}, {"a": score(0.4), "b": score(None)}]
    assert best_scores(runs) == {"a": 0.4}


def test_the_values_of_a_recipe_that_are_not_the_defaults_are_grouped(tmp_path):
    changed = ["objective.tau=0.3", "policy.lora.rank=4", "eval.k=[1, 2]", "seed=5"]
    make_run(tmp_path / "run", *changed)
    [[run], _] = read_folders([tmp_path / "run"])
    found = changed_settings(run)
    assert next(iter(found)) == "" and found[""]["seed"] == "5"
    assert found["objective"] == {"tau": "0.3"}
    assert found["policy"]["lora.rank"] == "4"
    assert found["eval"]["k"] == "1, 2"
    assert found["reward"]["functions.1.name"] == "exact"


def test_steps_without_a_policy_are_spread_evenly_within_the_budget(tmp_path, monkeypatch):
    make_run(tmp_path / "run", metrics=[step(n) for n in range(1, 9)], groups=range(1, 9))
    [[run], _] = read_folders([tmp_path / "run"])
    shown = select_steps(run, 8)
    assert [s.step for s in shown] == [1]
    others = other_steps(run, shown, 8, 1)
    assert [s.step for s in others] == [2, 3, 4, 5, 6, 7, 8]
    assert {s.policy for s in others} == {""}
    size = len(json.dumps([others[-1].groups, []]))
    monkeypatch.setattr("gft_lite.report.group_browser._TEXT_BUDGET", 6 * size + 1)
    assert [s.step for s in other_steps(run, shown, 8, 2)] == [2, 4, 6]
