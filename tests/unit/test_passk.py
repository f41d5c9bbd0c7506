"""pass@k against hand-computed values and against counting every subset."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from fractions import Fraction
from statistics import fmean, quantiles

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gft_lite.utils.statistics import (
    average_interval,
    bootstrap_interval,
    mean_pass_at_k,
    paired_interval,
    pass_at_k,
)


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [
        (8, 2, 1, 0.25),
        (4, 1, 2, 0.5),  # 3 of the 6 pairs contain the correct one.
        (5, 2, 3, 0.9),  # Only 1 of the 10 triples contains none.
        (8, 0, 8, 0.0),
        (8, 8, 1, 1.0),
        (8, 1, 8, 1.0),
        (1, 1, 1, 1.0),
        (1, 0, 1, 0.0),
        (10, 7, 4, 1.0),  # Fewer wrong ones than draws.
    ],
)
def test_hand_computed(n: int, correct: int, k: int, expected: float):
    assert pass_at_k(n, correct, k) == expected


def test_every_small_case_against_counting_subsets():
    for n in range(1, 9):
        for correct in range(n + 1):
            samples = [True] * correct + [False] * (n - correct)
            for k in range(1, n + 1):
                draws = [any(draw) for draw in itertools.combinations(samples, k)]
                assert pass_at_k(n, correct, k) == sum(draws) / len(draws), (n, correct, k)


@pytest.mark.parametrize(
    ("correct", "k"), [(1, 1), (1, 512), (3, 1), (512, 2), (1, 1024), (900, 9)]
)
def test_exact_to_the_last_bit_with_1024_samples(correct: int, k: int):
    none_right = Fraction(1)
    for i in range(k):
        none_right *= Fraction(max(1024 - correct - i, 0), 1024 - i)
    assert pass_at_k(1024, correct, k) == float(1 - none_right)


@given(st.data())
@settings(deadline=None, derandomize=True)
def test_increases_with_k_and_with_correct(data: st.DataObject):
    n = data.draw(st.integers(2, 200))
    correct, k = data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n - 1))
    here = pass_at_k(n, correct, k)
    assert 0 <= here <= pass_at_k(n, correct, k + 1) <= 1
    assert here < pass_at_k(n, correct + 1, k) or here == 1
    assert pass_at_k(n, correct, 1) == correct / n


def test_unbiased_over_the_samples_drawn():
    # 3 of 10 possible samples are correct. Over all draws of 6, the estimate of pass@2 averages
    # to pass@2 of all 10: 1 - (7 * 6) / (10 * 9) = 8/15.
    possible = [1] * 3 + [0] * 7
    estimates = [pass_at_k(6, sum(draw), 2) for draw in itertools.combinations(possible, 6)]
    assert sum(estimates) / len(estimates) == pytest.approx(8 / 15, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "correct", "k", "field"),
    [(8, 2, 9, "k"), (8, 2, 0, "k"), (8, 9, 1, "correct"), (8, -1, 1, "correct"), (0, 0, 1, "k")],
)
def test_impossible_counts(n: int, correct: int, k: int, field: str):
    with pytest.raises(ValueError, match=rf"^{field}: must be .*, got "):
        pass_at_k(n, correct, k)


def test_mean_over_problems():
    assert mean_pass_at_k([(4, 1), (4, 0), (8, 8)], 2) == 0.5  # (0.5 + 0 + 1) / 3
    assert mean_pass_at_k([(4, 1), (2, 1)], 1) == 0.375
    with pytest.raises(ValueError, match=r"^counts: must hold at least one problem, got none"):
        mean_pass_at_k([], 1)
    with pytest.raises(ValueError, match=r"^k: must be from 1 to n = 2, got 3"):
        mean_pass_at_k([(4, 1), (2, 1)], 3)


# --- intervals -------------------------------------------------------------------------------


def test_an_interval_without_spread_is_a_point():
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5)
    assert bootstrap_interval([3.0]) == (3.0, 3.0)


def test_an_interval_against_every_resample_of_two_values():
    # The mean of two draws from {0, 1} is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0], level=0.95) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.3) == (0.5, 0.5)


def test_an_interval_against_the_normal_one_of_many_values():
    values = [1.0] * 300 + [0.0] * 700
    low, high = bootstrap_interval(values)
    spread = 1.959964 * (0.3 * 0.7 / 1000) ** 0.5  # 0.0284
    assert low == pytest.approx(0.3 - spread, abs=3e-3)
    assert high == pytest.approx(0.3 + spread, abs=3e-3)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < 0.3 < narrow[1] < high


def test_the_draws_are_those_of_the_standard_library():
    # Another implementation of the same draws and quantiles: published intervals stay as they are.
    groups = [[0.0, 1.0, 1.0, 0.5, 1 / 3], [0.25], [i / 7 for i in range(40)]]
    for seed in (0, 1, 2**31):
        draw = random.Random(seed).choices
        means = [fmean(fmean(draw(g, k=len(g))) for g in groups) for _ in range(501)]
        ends = quantiles(means, n=20, method="inclusive")
        found = average_interval(groups, level=0.9, resamples=501, seed=seed)
        assert found == pytest.approx((ends[0], ends[-1]), abs=1e-14)


def test_the_seed_decides():
    values = [random.Random(1).random() for _ in range(20)]
    values = [value * i for i, value in enumerate(values)]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) == bootstrap_interval(values, seed=0)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_the_global_generator_is_not_used():
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    bootstrap_interval([0.0, 1.0], resamples=3)
    assert (random.random(), np.random.random()) == expected


def test_the_coverage_of_an_interval_is_its_level():
    draws = random.Random(2)
    hits = 0
    for seed in range(200):
        values = [float(draws.random() < 0.4) for _ in range(60)]
        low, high = bootstrap_interval(values, level=0.9, resamples=200, seed=seed)
        hits += low <= 0.4 <= high
    assert 0.82 <= hits / 200 <= 0.97


def test_a_paired_interval_is_narrower_than_the_spread_of_the_problems():
    easy_and_hard = [i / 50 for i in range(50)]
    better = [value + 0.1 for value in easy_and_hard]
    low, high = paired_interval(better, easy_and_hard)
    assert (low, high) == pytest.approx((0.1, 0.1), abs=1e-12)
    assert paired_interval(easy_and_hard, better) == pytest.approx((-0.1, -0.1), abs=1e-12)
    assert paired_interval([1, 0, 1], [0, 0, 0], level=0.8, resamples=50, seed=3) == (
        bootstrap_interval([1.0, 0.0, 1.0], level=0.8, resamples=50, seed=3)
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"values": []}, r"^values: must hold at least one problem, got none"),
        ({"values": [0.0, float("nan")]}, r"^values: must be finite, got one that is not"),
        ({"values": [1.0], "level": 1.0}, r"^level: must be between 0 and 1, got 1.0"),
        ({"values": [1.0], "level": 0.0}, r"^level: must be between 0 and 1, got 0.0"),
        ({"values": [1.0], "resamples": 0}, r"^resamples: must be at least 1, got 0"),
    ],
)
def test_impossible_intervals(arguments: dict, text: str):
    with pytest.raises(ValueError, match=text):
        bootstrap_interval(**arguments)
    with pytest.raises(ValueError, match=r"^a, b: must hold the same problems, got 1 and 2"):
        paired_interval([1.0], [1.0, 2.0])


def test_only_the_standard_library_is_imported():
    code = (
        "import sys, gft_lite.utils.statistics; "
        "print({'numpy', 'torch', 'scipy'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
