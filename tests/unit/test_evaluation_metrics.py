"""Figures of evaluations, with hand-computed values; the formats of the tables."""

from __future__ import annotations

import csv
import io
import math

import pytest

from gft_lite.evaluation.examples import Examples
from gft_lite.evaluation.metrics import (
    average,
    by_problem,
    compare,
    distinct,
    headline,
    likelihood,
    main_figure,
    measure,
    restrict,
)
from gft_lite.evaluation.tables import tables, to_csv
from gft_lite.rewards.base import RewardError
from gft_lite.types import Group, Problem, Response
from gft_lite.utils.statistics import average_interval, bootstrap_interval
from gft_lite.utils.tables import Table


def graded(text, right, *, tokens=2, finish="stop", verdict="ok"):
    return Response(tuple(range(tokens)), text, "self", finish, reward=float(right),
                    correct=bool(right), verdict=verdict)  # fmt: skip


def group(name, *responses, kind="math"):
    return Group(Problem(name, f"{name}?", "1", columns={"answer_type": kind}), responses)


def figures(correct, samples=4, **others):
    """A benchmark's figures with so many right answers to each problem."""
    groups = [group(i, *[graded("", n < c) for n in range(samples)]) for i, c in correct.items()]
    return {**measure(groups, [2]), "distinct": 1.0, **others}


def test_a_benchmark():
    groups = [
        group("a", graded("", 1), graded("", 0, tokens=6, finish="length")),
        group("b", graded("", 0, verdict="no_answer"), graded("", 0)),
    ]
    found = measure(groups, [2])
    assert found["pass@1"] == 0.25  # (1/2 + 0) / 2
    assert found["pass@2"] == 0.5
    assert (found["truncated"], found["no_answer"], found["length"]) == (0.25, 0.25, 3.0)
    assert found["correct"] == {"a": 1, "b": 0}


def rewarded(*rewards):
    return [Response((1,), "", "self", reward=reward, verdict="ok") for reward in rewards]


def test_without_a_rule_of_correctness_the_figure_is_the_mean_reward():
    groups = [group("a", *rewarded(0.6, 1.0, None)), group("b", *rewarded(0.7, 0.5)),
              group("c", *rewarded(None, None))]  # fmt: skip
    found = measure(groups, [1, 2])
    assert not any(name.startswith("pass@") or name == "correct" for name in found)
    assert found["mean_reward"] == pytest.approx((0.8 + 0.6) / 2)
    assert found["rewards"] == pytest.approx({"a": 0.8, "b": 0.6})
    assert found["mean_reward_interval"] == pytest.approx((0.6, 0.8))
    assert main_figure(found) == "mean_reward"
    other = measure([group("a", *rewarded(0.9))], [1])
    assert headline({"test": found, "more": other}, [1, 2]) == pytest.approx(
        {"mean_reward": 0.7, "more": 0.9}
    )
    difference = compare({"x": found}, {"x": other})["x"]
    assert difference["difference"] == pytest.approx(0.1)
    assert difference["problems"] == 1
    averaged = average({"x": {**found, "distinct": 1.0}, "y": {**other, "distinct": 1.0}})
    assert averaged["mean_reward"] == pytest.approx((0.7 + 0.9) / 2)
    assert averaged["mean_reward_interval"] == pytest.approx((0.75, 0.85))


def test_the_likelihood_of_demonstrations_is_a_mean_over_tokens():
    sizes = {"problems": 3, "samples": 0}
    found = {**likelihood({"a": 6.0, "b": 1.0, "c": 1.0}, {"a": 2, "b": 1, "c": 1}), **sizes}
    assert (found["nll"], found["perplexity"]) == (2.0, pytest.approx(math.e**2))
    assert main_figure(found) == "nll"
    assert headline({"test": found, "more": found}, [1, 8]) == {"nll": 2.0, "more": 2.0}
    # 2 + (nats - 2 tokens) / (4 tokens / 3 problems), so that the mean is 2.
    assert by_problem(found) == pytest.approx({"a": 3.5, "b": 1.25, "c": 1.25})
    low, high = found["nll_interval"]
    assert 1.25 <= low < 2 < high <= 3.5
    part = restrict(found, ["a", "b"], [1])
    assert (part["nll"], part["problems"], part["samples"]) == (pytest.approx(7 / 3), 2, 0)
    # Half of a nat less for every token is a difference without any spread.
    better = {**likelihood({"a": 5.0, "b": 0.5, "c": 0.5}, {"a": 2, "b": 1, "c": 1}), **sizes}
    difference = compare({"x": found}, {"x": better})["x"]
    assert difference["interval"] == pytest.approx((-0.5, -0.5))
    assert average({"x": found, "y": better})["nll"] == 1.75


def test_with_a_rule_of_correctness_the_figures_are_pass_at_k():
    found = figures({"a": 1, "b": 3})
    assert main_figure(found) == "pass@1"
    assert by_problem(found) == {"a": 0.25, "b": 0.75}
    # a: 1 - C(3,2)/C(4,2) = 1/2, b: 1.
    assert headline({"test": found, "more": figures({"c": 2})}, [1, 2]) == {
        "pass@1": 0.5, "pass@2": 0.75, "more": 0.5,
    }  # fmt: skip


def test_an_evaluation_without_any_reward_is_an_error():
    with pytest.raises(RewardError, match=r"at least one response .* got None for all 2"):
        measure([group("a", *rewarded(None, None))], [1])


def test_distinct_answers_are_counted_as_they_are_written():
    boxed = [graded(rf"so \boxed{{{a}}}", 1) for a in ("1", "1", " 1", "2")]
    assert distinct([group("a", *boxed, graded("none", 0))]) == 2.0
    assert distinct([group("a", *boxed), group("b", graded("none", 0))]) == 1.0
    letters = [graded(text, 1) for text in ("The answer is B.", r"\boxed{B}", "(C)")]
    assert distinct([group("a", *letters, kind="choice")]) == 2.0
    lab = [graded(text, 1) for text in ("@1;2#2", "&1,2#2", "@3#3", "4")]
    assert distinct([group("a", *lab)], marker="#") == 2.0


def test_the_average_weighs_benchmarks_not_problems():
    made = average({"a": figures({"x": 4}), "b": figures({"x": 0, "y": 0, "z": 2})})
    assert made["pass@1"] == pytest.approx((1 + 1 / 6) / 2)
    # Of z's four samples two are right: 1 - C(2,2)/C(4,2) = 5/6; a third of it, and 1.
    assert made["pass@2"] == pytest.approx((1 + 5 / 18) / 2)
    low, high = made["pass@1_interval"]
    # The single problem of `a` never varies, that of `b` from 0 to 1/2.
    assert 0.5 <= low < made["pass@1"] < high <= 0.75


def test_an_average_of_one_is_the_plain_interval():
    values = [0.0, 0.25, 1.0, 0.5]
    assert average_interval([values]) == bootstrap_interval(values)
    assert average_interval([[1.0], [0.0]]) == (0.5, 0.5)
    for nothing in ([], [[]], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one problem"):
            average_interval(nothing)


def test_differences_are_taken_on_the_problems_that_both_answered():
    a = {"x": figures({"p": 4, "q": 0, "only-a": 4}), "only-a": figures({"p": 4})}
    b = {"x": figures({"q": 1, "p": 2, "only-b": 4}), "y": figures({"p": 4})}
    found = compare(a, b)
    # p: 2/4 - 4/4, q: 1/4 - 0/4.
    assert set(found) == {"x", "average"}
    assert found["x"]["difference"] == pytest.approx((-0.5 + 0.25) / 2)
    assert found["x"]["problems"] == 2
    assert found["x"]["interval"] == bootstrap_interval([0.25, -0.5])
    assert compare(b, a)["x"]["difference"] == -found["x"]["difference"]
    assert compare({"x": figures({"p": 1})}, {"y": figures({"p": 1})}) == {}


def test_a_constant_gain_has_no_spread_however_hard_the_problems():
    a = {"x": figures({"p": 0, "q": 1, "r": 3}), "y": figures({"p": 2})}
    b = {"x": figures({"p": 1, "q": 2, "r": 4}), "y": figures({"p": 4})}
    found = compare(a, b)
    assert found["x"]["interval"] == (0.25, 0.25)
    assert found["average"]["difference"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["average"]["interval"] == pytest.approx((0.375, 0.375))
    assert found["average"]["problems"] == 4


# --- tables ----------------------------------------------------------------------------------


@pytest.fixture
def results():
    ran = {
        "base_1": {"x": figures({"p": 1, "q": 0}), "y": figures({"p": 4})},
        "run": {"x": figures({"p": 3, "q": 0})},
    }
    drift = {"base_1": {"entropy": 1.5}, "run": {"forward": 0.25, "reverse": 0.5, "entropy": 1.0}}
    return {
        "benchmarks": {"x": "Set X & Co", "y": "Y"},
        "protocol": {"samples": 4, "k": [1, 2]},
        "targets": {
            label: {"benchmarks": found, "average": average(found), "drift": drift[label]}
            for label, found in ran.items()
        },
        "pairs": [{"a": "base_1", "b": "run", "differences": compare(ran["base_1"], ran["run"])}],
    }


def test_the_papers_shape(results):
    accuracy, pass_at_k, pairs, conduct = tables(results)
    assert accuracy.header == ("model", "Set X & Co", "Y", "average")
    assert accuracy.rows == (("base_1", "12.5", "100.0", "56.2"), ("run", "37.5", "-", "37.5"))
    assert pass_at_k.rows[0] == ("Set X & Co", "base_1", "12.5", "25.0")
    assert pairs.rows == (("run - base_1", "+25.0 [+0.0, +50.0]", "-", "+25.0 [+0.0, +50.0]"),)
    assert conduct.rows[0][:4] == ("base_1", "-", "-", "1.5000")
    assert conduct.rows[1][:5] == ("run", "0.2500", "0.5000", "1.0000", "2")


def test_markdown_and_latex_escape_what_they_must():
    table = Table("100% of it", ("model", "a|b"), (("base_1", "1 & 2"),))
    assert table.markdown().splitlines() == [
        "## 100% of it", "", "| model | a\\|b |", "| :-- | --: |", "| base_1 | 1 & 2 |",
    ]  # fmt: skip
    latex = table.latex()
    assert r"\caption{100\% of it}" in latex
    assert r"\begin{tabular}{lr}" in latex
    assert r"base\_1 & 1 \& 2 \\" in latex


def test_a_table_too_wide_for_the_terminal_lies_on_its_side():
    table = Table("t", ("model", *"abcdef"), (("m", *"123456"),))
    assert [c.header for c in table.rich(80).columns] == ["model", *"abcdef"]
    assert [c.header for c in table.rich(20).columns] == ["model", "m"]
    assert list(table.rich(20).columns[1].cells) == list("123456")


def test_csv_has_a_line_for_each_model_and_benchmark(results):
    lines = list(csv.DictReader(io.StringIO(to_csv(results))))
    assert [(r["model"], r["benchmark"]) for r in lines] == [
        ("base_1", "x"), ("base_1", "y"), ("run", "x"),
    ]  # fmt: skip
    assert float(lines[2]["pass@1"]) == 0.375
    assert float(lines[2]["low"]) == 0.0
    assert float(lines[2]["high"]) == 0.75


def test_examples_show_two_models_where_they_differ():
    def answered(name, text, answer, *responses):
        return Group(Problem(name, text, answer), tuple(graded(r, right) for r, right in responses))

    examples = Examples(per_benchmark=1)
    examples.add("x", "base", answered("p", "1 < 2?", "7", ("r0", True), ("w0", False)))
    examples.add("x", "run", answered("p", "1 < 2?", "7", ("w1\n\n<b>", False)))
    examples.add("x", "base", answered("q", "two?", "8", ("w2", False)))
    examples.add("y", "base", answered("q", "three?", "9", ("w3", False)))
    text = examples.markdown()
    assert "<th>right: base</th><th>wrong: run</th>" in text
    assert "<pre>r0</pre>" in text
    assert "<pre>w1\n&nbsp;\n&lt;b&gt;</pre>" in text
    assert "> 1 < 2?" in text
    assert "two?" not in text
    assert text.rstrip().endswith("No problem was answered both right and wrong.")
