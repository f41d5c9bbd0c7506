"""The table of figures: what an evaluation writes is in it, and what is in it can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gft_lite.evaluation.metrics import distinct, likelihood, measure, restrict
from gft_lite.evaluation.results import make_results
from gft_lite.evaluation.suites import Suite
from gft_lite.recipe.course_sections import EvalSettings
from gft_lite.recipe.figures import (
    BY_PROBLEM,
    COMPARED,
    FIGURES,
    check_names,
    compared,
    figure_of,
    find_figure,
    lower_is_better,
    main_figure,
)
from gft_lite.types import Group, Problem, Response

PROBLEM = Problem("a", "1 + 1?", "2")
METRICS = Path(__file__).parents[2] / "docs" / "site" / "metrics.yaml"


def graded(correct: bool | None) -> list[Group]:
    return [Group(PROBLEM, tuple(Response((1,), "2", "self", reward=1.0, correct=correct)
                                 for _ in range(4)))]  # fmt: skip


SETS = {
    "accuracy": measure(graded(True), [2, 4]) | {"distinct": distinct(graded(True))},
    "reward": measure(graded(None), [2, 4]),
    "likelihood": {**likelihood({"a": 3.0}, {"a": 2}), "problems": 1, "samples": 0},
}


def test_every_figure_of_an_evaluation_is_in_the_table():
    for figures in SETS.values():
        check_names(figures)
        assert main_figure(figures) in figures
        # What models are compared by has values by problem and an interval.
        assert all(key in figures for key in figure_of(main_figure(figures)).values)
        assert f"{main_figure(figures)}_interval" in figures
    written = {name for figures in SETS.values() for name in figures}
    assert {find_figure(name) for name in written} - {None} == set(FIGURES)
    assert written >= BY_PROBLEM


@pytest.mark.parametrize("name", ["maj@4", "pass@", "pass@x", "accuracy", "longest"])
def test_a_figure_outside_of_the_table_is_not_written(name: str):
    figures = SETS["accuracy"] | {name: 0.5}
    with pytest.raises(ValueError, match=rf"{name}: must be in FIGURES"):
        check_names(figures)
    with pytest.raises(ValueError, match=rf"{name}: must be in FIGURES"):
        make_results(Suite.load("lab"), ["m"], {"m": {"benchmarks": {"lab": figures},
                                                     "sampling": {}, "adapter": None}})  # fmt: skip


def test_which_values_are_better():
    falling = {figure.name for figure in FIGURES if figure.lower_is_better}
    assert falling == {"nll", "perplexity", "truncated", "no_answer"}
    assert [lower_is_better(m) for m in ("nll", "a/b/nll", "test/pass@8", "nll/x", None)] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_names_by_k():
    assert [figure.name for figure in COMPARED] == ["pass@*", "mean_reward", "nll"]
    assert EvalSettings(k=[4]).figures_of(["test"]) == [
        "test/pass@1", "test/pass@4", "test/mean_reward", "test/nll",
    ]  # fmt: skip
    assert compared(SETS["accuracy"]) == ["pass@1", "pass@2", "pass@4"]
    assert [main_figure(figures) for figures in SETS.values()] == ["pass@1", "mean_reward", "nll"]
    assert main_figure({}) == "pass@1"


def test_a_part_of_a_set_keeps_its_figures():
    for figures in SETS.values():
        assert compared(restrict(figures, ["a"], [2, 4])) == compared(figures)


def test_the_manual_has_their_units():
    tables = yaml.safe_load(METRICS.read_text(encoding="utf-8"))
    rows = tables["eval/"] | tables["results.json of gft-lite eval"]
    assert {f.name: rows[f.name][1] for f in FIGURES} == {f.name: f.unit for f in FIGURES}
    assert all(rows[f.name][2].startswith("falls") for f in COMPARED if f.lower_is_better)
