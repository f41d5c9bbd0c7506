"""The verdict against simulations with known truth, values by hand, and its rules in words."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from referee_cases import comparison, outcome, simulated

from gft_lite.experiments.verdict import KL, headline_sentences, judge, rules, verdict_table
from gft_lite.utils.paired_difference import paired_difference
from gft_lite.utils.statistics import holm, t_interval

SIMULATIONS = 400
# Three standard errors of a share of 5% over the simulations: 3.3%.
ERROR = 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)


def scores(gains, *, runs, problems, samples, seed_sd, seed=0):
    """Simulated scores of methods with known gains.

    Methods differ by problem (standard deviation 0.1), by seed, and by problem and seed (0.08).
    Probabilities stay within 0 and 1 so that gains are exact.
    Shapes: -> [SIMULATIONS, methods, runs, problems].
    """
    draw = np.random.default_rng(seed)
    shape = (SIMULATIONS, len(gains), runs, problems)
    easy = draw.uniform(0.4, 0.55, (SIMULATIONS, 1, 1, problems))
    p = easy + np.array(gains)[:, None, None]
    p = p + 0.1 * _signs(draw, (SIMULATIONS, len(gains), 1, problems))
    p = p + seed_sd * _signs(draw, (SIMULATIONS, len(gains), runs, 1))
    p = p + 0.08 * _signs(draw, shape)
    return draw.binomial(samples, p) / samples


def _signs(draw, shape):
    """Normal deviates cut at 1.5 standard deviations, which no probability leaves the range by."""
    return np.clip(draw.normal(size=shape), -1.5, 1.5)


DESIGNS = [
    {"runs": 1, "problems": 60, "samples": 4, "seed_sd": 0.0},
    {"runs": 2, "problems": 60, "samples": 4, "seed_sd": 0.02},
    {"runs": 3, "problems": 60, "samples": 16, "seed_sd": 0.05},
    {"runs": 3, "problems": 200, "samples": 4, "seed_sd": 0.0},
    {"runs": 6, "problems": 60, "samples": 4, "seed_sd": 0.02},
]


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_intervals_cover_the_truth_and_false_verdicts_are_rare(design):
    none, same, small = np.moveaxis(scores([0, 0, 0.03], **design), 1, 0)
    for method, truth in ((same, 0.0), (small, 0.03)):
        found = paired_difference(method - none)
        low, high = (found.mean - found.half_width(), found.mean + found.half_width())
        covered = np.mean((low <= truth) & (truth <= high))
        assert covered >= 0.95 - ERROR
        # A p value of at most 0.05 is an interval without 0; equivalence is the 90% interval.
        assert np.array_equal(found.p_value() <= 0.05, (low > 0) | (high < 0))
        inside = np.abs(found.mean) + found.half_width(0.9) <= 0.06
        assert np.array_equal(found.equivalence_p(0.06) <= 0.05, inside)
    at_the_margin = paired_difference(small - none).equivalence_p(0.03)
    assert np.mean(at_the_margin <= 0.05) <= 0.05 + ERROR


@pytest.mark.parametrize("design", DESIGNS[1:4], ids=str)
def test_any_of_several_methods_is_rarely_found_better_by_chance(design):
    """The methods share the one that they are compared with, as in a comparison."""
    drawn = scores([0, 0, 0, 0, 0], **design)
    p = paired_difference(drawn[:, 1:] - drawn[:, :1]).p_value()
    assert p.shape == (SIMULATIONS, 4)
    false = np.mean([min(holm(each)) <= 0.05 for each in p.tolist()])
    assert false <= 0.05 + ERROR


def test_what_is_there_is_found():
    drawn = scores([0, 0.1, 0], runs=6, problems=200, samples=8, seed_sd=0.02)
    better, same = (paired_difference(drawn[:, i] - drawn[:, 0]) for i in (1, 2))
    assert np.mean(better.p_value() <= 0.05) > 0.99
    assert np.mean(better.equivalence_p(0.05) <= 0.05) == 0
    assert np.mean(same.equivalence_p(0.08) <= 0.05) > 0.9
    # The detectable difference is found about 4 times in 5.
    size = float(np.median(same.detectable()))
    drawn = scores([0, size], runs=6, problems=200, samples=8, seed_sd=0.02, seed=1)
    power = np.mean(paired_difference(drawn[:, 1] - drawn[:, 0]).p_value() <= 0.05)
    assert 0.7 <= power <= 0.95


def test_runs_of_one_base_are_one_cluster():
    """Methods gain more on some bases: runs as clusters would be too sure, bases are not."""
    draw = np.random.default_rng(0)
    of_base = draw.normal(0, 0.05, (SIMULATIONS, 3, 1, 1))
    table = of_base + draw.normal(0, 0.3, (SIMULATIONS, 3, 3, 100))
    by_run = paired_difference(table.reshape(SIMULATIONS, 9, 100))
    by_base = paired_difference(table.mean(2))
    covered = [np.mean(np.abs(d.mean) <= d.half_width()) for d in (by_run, by_base)]
    assert covered[0] < 0.85 and covered[1] >= 0.95 - ERROR


# --- values by hand --------------------------------------------------------------------------


def test_two_runs_and_two_problems_by_hand():
    # Run means 0.3 and 0.1, problem means 0.3 and 0.1, and no rest: each part has variance
    # 0.02 / 2 = 0.01 and one degree of freedom, t(0.975) = tan(0.475 pi) = 12.7062.
    found = paired_difference([[0.4, 0.2], [0.2, 0.0]])
    assert found.mean == pytest.approx(0.2)
    assert (found.run_variance, found.problem_variance) == pytest.approx((0.01, 0.01))
    assert found.half_width() == pytest.approx(math.tan(0.475 * math.pi) * math.sqrt(0.02))
    # t = 0.2 / sqrt(0.02) = sqrt(2); P(|t| > sqrt(2)) = 1 - 2 / pi * atan(sqrt(2)).
    assert found.p_value() == pytest.approx(1 - 2 / math.pi * math.atan(math.sqrt(2)))
    # 0.1 inside of the margin: half of P(|t| > 0.1 / sqrt(0.02)).
    inside = (1 - 2 / math.pi * math.atan(0.1 / math.sqrt(0.02))) / 2
    assert found.equivalence_p(0.3) == pytest.approx(inside)
    assert found.equivalence_p(0.1) == pytest.approx(1 - inside)


def test_the_rest_is_counted_once():
    # Problem means 0.2 and 0.2; run means 0.2 and 0.2; all is rest: 0.2 squared four times.
    found = paired_difference([[0.4, 0.0], [0.0, 0.4]])
    assert (found.run_variance, found.problem_variance) == pytest.approx((0, 0))
    # Problem means 0.4 and 0.1: 0.045 / 2; rest: +-0.05 four times, 0.01 / 1 / 4.
    found = paired_difference([[0.5, 0.1], [0.3, 0.1]])
    assert found.run_variance == pytest.approx((0.3 - 0.2) ** 2 / 2 / 2)
    assert found.problem_variance == pytest.approx(0.045 / 2 - 0.01 / 4)
    assert found.fixed_run_variance == pytest.approx(0.045 / 2)
    more = found.with_runs(4)
    assert more.run_variance == pytest.approx(found.run_variance / 2)
    assert more.fixed_run_variance == pytest.approx(0.045 / 2 - 0.01 / 8)


def test_one_run_has_students_interval_over_problems_and_kl_over_runs():
    values = [0.1, 0.3, 0.5, 0.1]
    low, high = t_interval(values)
    assert low == pytest.approx(0.25 - 3.18245 * 0.1914854 / 2, abs=1e-5)
    for table in ([values], [[value] for value in values]):
        found = paired_difference(table)
        assert found.mean - found.half_width() == pytest.approx(low)
        assert found.mean + found.half_width() == pytest.approx(high)


def test_runs_that_are_equal_by_chance_are_not_sure():
    found = paired_difference([[0.0, 0.5, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    assert found.run_variance == 0
    over_problems = t_interval([0.25, 0.25, 0.0, 0.0])
    assert found.mean - found.half_width() == pytest.approx(over_problems[0])
    # Without any spread, the signs decide: 3 problems alike have a chance of 2 / 2^3.
    assert paired_difference([[0.5, 0.5, 0.5]] * 2).p_value() == 0.25
    assert paired_difference([[0.0, 0.0, 0.0]] * 2).p_value() == 1
    assert not paired_difference([[0.5]]).known


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# --- verdicts --------------------------------------------------------------------------------


def test_a_tiny_comparison_by_hand():
    runs = [
        outcome("gft", 0, {"test": [0.9, 0.7]}, kl=0.3), outcome("sft", 0, {"test": [0.5, 0.5]}),
        outcome("gft", 1, {"test": [0.7, 0.5]}, kl=0.1), outcome("sft", 1, {"test": [0.5, 0.5]}),
    ]  # fmt: skip
    found = judge(comparison(runs))
    [verdict] = found["test"]
    half = math.tan(0.475 * math.pi) * math.sqrt(0.02)
    assert (verdict.low, verdict.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert (verdict.word, verdict.runs, verdict.problems) == ("not separable", 2, 2)
    assert verdict.over == "seeds and problems"
    [by_kl] = found[KL]
    assert by_kl.difference == pytest.approx(0.1) and by_kl.word == "not separable"
    assert (by_kl.low, by_kl.high) == pytest.approx(t_interval([0.2, 0.0]))


def test_swapped_methods_flip_the_sign_and_the_order_of_runs_does_not_matter():
    made = simulated({"gft": 0.2, "grpo": -0.1}, runs=6, problems=40)
    found = judge(made)
    backwards = replace(made, outcomes=made.outcomes[::-1])
    shuffled = [
        replace(o, scores={n: dict(reversed(list(v.items()))) for n, v in o.scores.items()})
        for o in made.outcomes
    ]
    assert judge(backwards) == found == judge(replace(made, outcomes=tuple(shuffled)))
    swapped = judge(replace(made, methods=("sft", "gft"), against="gft"))
    alone = judge(replace(made, methods=("sft", "gft")))
    for measure in ("test", "old", KL):
        [one], [other] = alone[measure], swapped[measure]
        assert other.difference == pytest.approx(-one.difference)
        assert (other.low, other.high) == pytest.approx((-one.high, -one.low))
        assert other.p == pytest.approx(one.p)
    assert (alone["test"][0].word, swapped["test"][0].word) == ("better", "worse")
    assert (alone[KL][0].word, swapped[KL][0].word) == ("higher", "lower")


def test_bases_take_the_place_of_runs():
    made = simulated({"gft": 0.1}, runs=6, problems=30)
    based = [replace(o, base=f"base {o.seed // 2}") for o in made.outcomes]
    [found] = judge(replace(made, outcomes=tuple(based)))["test"]
    assert (found.runs, found.over) == (6, "bases and problems")
    by_run = [
        [[a - b for a, b in zip(gft.scores["test"].values(), sft.scores["test"].values(),
                                strict=True)]
         for gft, sft in zip(based[6:], based[:6], strict=True)]
    ]  # fmt: skip
    expected = paired_difference(np.array(by_run).reshape(3, 2, 30).mean(1))
    assert found.high - found.low == pytest.approx(2 * expected.half_width())
    # The same runs of one base are six clusters.
    [alone] = judge(made)["test"]
    assert (alone.runs, alone.over) == (6, "seeds and problems")


def test_only_pairs_of_runs_and_common_problems_count():
    runs = [
        outcome("sft", 0, {"test": {"a": 0.5, "b": 0.5}}),
        outcome("gft", 0, {"test": {"b": 0.7, "c": 1.0}}),
        outcome("gft", 1, {"test": {"b": 0.0}}),
        outcome("dft", 1, {"test": {"b": 0.0}}),
        outcome("psft", 0, {"other": {"b": 0.0}}),
    ]
    made = replace(comparison(runs), methods=("sft", "gft", "dft", "hpt", "psft"))
    gft, dft, hpt, psft = judge(made)["test"]
    assert (gft.runs, gft.problems, gft.difference) == (1, 1, pytest.approx(0.2))
    assert gft.low is None and gft.word == "not separable"
    assert dft.reason == "no run of dft shares base, seed and problems with one of sft"
    assert hpt.reason == "no run of hpt finished"
    assert psft.reason == "psft has no figures"
    assert {verdict.word for verdict in (dft, hpt, psft)} == {"not compared"}
    texts = headline_sentences(made, (gft, dft, hpt, psft))
    assert "hpt is not compared: no run of hpt finished." in texts
    assert judge(replace(made, against="hpt"))["test"][0].reason == "no run of hpt finished"


# --- words -----------------------------------------------------------------------------------


def answers(made):
    return headline_sentences(made, judge(made)["test"])


def test_the_answer_comes_first():
    first, second, *_ = answers(simulated({"grpo": -0.2, "gft": 0.2}, problems=200))
    assert first.startswith("gft is better than sft by ") and first.endswith(" on test.")
    assert second.startswith("grpo is worse than sft by ")
    low, high = map(float, first.partition("[")[2].partition("]")[0].split(", "))
    assert 2 < low < 20 < high < 40


def test_a_sure_difference_below_the_margin_counts_as_none():
    made = simulated({"gft": 0.04}, runs=6, problems=400, samples=64, seed_sd=0.002)
    sure, wide = (judge(replace(made, margin=margin))["test"][0] for margin in (0.01, 0.1))
    assert sure.word == "better" and wide.word == "equal within the margin"
    assert sure.p == wide.p < 0.05
    [text, *_] = answers(replace(made, margin=0.1))
    assert text.startswith("gft equals sft within the margin of 10 points on test: +")
    size = 100 * sure.difference
    [text, *_] = answers(replace(made, margin=sure.difference))
    assert text.endswith(f"on test, which may be less than the margin of {size:g}.")
    assert all(v.word != "equal within the margin" for v in judge(replace(made, margin=0.1))[KL])


def test_one_seed_says_that_seeds_are_not_covered():
    made = simulated({"gft": 0.0}, runs=1, problems=50)
    texts = answers(made)
    assert any("cover the choice of problems, not of seeds" in text for text in texts)
    assert judge(made)["test"][0].over == "problems only"
    assert judge(made)[KL][0].low is None


def test_what_the_design_would_have_found_is_said():
    made = simulated({"gft": 0.0, "grpo": 0.0}, problems=50)
    [none, one, _, more] = answers(made)
    assert none == "No method is separable from sft on test."
    verdict = next(v for v in judge(made)["test"] if one.startswith(v.method))
    assert f"about {100 * verdict.detectable:.1f} points or more would have been found" in one
    assert more.startswith("With 6 seeds, differences of about ")
    assert verdict.detectable_with_6 < verdict.detectable
    # Of two methods: Holm's first p must be at most .025.
    alone = judge(replace(made, methods=("sft", verdict.method)))["test"][0]
    assert (alone.low, alone.runs) == (verdict.low, verdict.runs)
    assert alone.detectable < verdict.detectable
    six = judge(simulated({"gft": 0.0}, runs=6, problems=20))["test"][0]
    assert six.detectable_with_6 is None
    text = " ".join(rules(made))
    for word in ("better, worse", "equal within the margin", "not separable", "Holm", "2 points"):
        assert word in text


def test_many_methods_that_are_not_separable_are_one_sentence():
    made = simulated({f"m{i}": 0.0 for i in range(8)} | {"bad": -0.2}, problems=50)
    unsure = [v for v in judge(made)["test"] if v.word == "not separable"]
    assert len(unsure) > 5
    [text] = [text for text in answers(made) if "ot separable" in text]
    assert text.startswith("Not separable from sft on test (difference in points): ")
    assert all(f"{v.method} ({100 * v.difference:+.1f})" in text for v in unsure)
    few = replace(made, methods=("sft", *(v.method for v in unsure[:5])))
    texts = answers(few)
    assert texts[0] == "No method is separable from sft on test."
    assert sum("is not separable from" in text for text in texts) == 5


def test_an_interval_without_zero_can_be_chance_among_several_methods():
    made = simulated({f"m{i}": 0.0 for i in range(5)}, runs=6, problems=40, seed_sd=0.0)
    gained = tuple(
        replace(o, scores={"test": {k: v + 0.1 for k, v in o.scores["test"].items()}})
        if o.method == "m0" else o for o in made.outcomes
    )  # fmt: skip
    made = replace(made, outcomes=gained)
    verdict = judge(made)["test"][0]
    alone = judge(replace(made, methods=("sft", "m0")))["test"][0]
    assert verdict.low == alone.low > 0
    assert (alone.word, verdict.word) == ("better", "not separable")
    assert verdict.p == pytest.approx(5 * alone.p)
    assert any("p adjusted for all methods" in text for text in answers(made))


def test_the_table_has_a_dash_for_what_is_not_known():
    made = replace(simulated({"gft": 0.2}, problems=30), methods=("sft", "gft", "hpt"))
    table = verdict_table(made, judge(made)["test"])
    gft, hpt = table.rows
    assert gft[:2] == ("gft", "better") and gft[6:] == ("3", "30")
    assert hpt == ("hpt", "not compared", "-", "-", "-", "-", "0", "0")
    assert verdict_table(made, judge(made)[KL]).header[2] == "difference, nats"


def test_a_design_that_could_find_nothing_says_so():
    made = simulated({"gft": 0.0}, runs=2, problems=30, seed_sd=0.2, seed=1)
    assert judge(made)["test"][0].detectable > 1
    assert answers(made)[0].endswith("no difference of any size would have been found reliably.")
