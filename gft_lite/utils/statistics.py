"""Unbiased pass@k, and intervals: bootstrap over problems, Student's t over seeds.

The standard library suffices.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean, stdev


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k samples is right, estimated from n of them.

    Source: arXiv 2107.03374, Eq. 1, `1 - C(n - c, k) / C(n, k)`. The integers are exact and
    divided once, so that no n is too large and no chance too small.

    Raises: ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct: must be from 0 to n = {n}, got {correct}")
    if not 1 <= k <= n:
        raise ValueError(f"k: must be from 1 to n = {n}, got {k}")
    draws = math.comb(n, k)
    return (draws - math.comb(n - correct, k)) / draws


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """The mean pass@k over problems, each of them `(n, correct)`.

    Raises: ValueError without problems, and as `pass_at_k`.
    """
    if not counts:
        raise ValueError("counts: must hold at least one problem, got none")
    return fmean(pass_at_k(n, correct, k) for n, correct in counts)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over problems; the same seed, the same answer.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Shapes: values [N], one per problem -> (low, high).
    Raises: ValueError without values, for a value that is not finite, for a level outside of
    (0, 1) and for less than one resample.
    """
    return average_interval([values], level=level, resamples=resamples, seed=seed)


def average_interval(
    groups: Sequence[Sequence[float]],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The bootstrap interval of the mean of several means, as of a table's average of benchmarks.

    The problems of each benchmark are resampled among themselves; all benchmarks weigh the same.
    Shapes: groups [B][N_b] -> (low, high).
    Raises: as `bootstrap_interval`.
    """
    if not groups or not all(groups):
        raise ValueError("values: must hold at least one problem, got none")
    if not all(math.isfinite(value) for values in groups for value in values):
        raise ValueError("values: must be finite, got one that is not")
    if not 0 < level < 1:
        raise ValueError(f"level: must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples: must be at least 1, got {resamples}")
    draw = random.Random(seed).choices
    means = sorted(
        fmean([fmean(draw(values, k=len(values))) for values in groups]) for _ in range(resamples)
    )
    return _quantile(means, (1 - level) / 2), _quantile(means, (1 + level) / 2)


def paired_interval(
    a: Sequence[float],
    b: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The bootstrap interval of mean(a) - mean(b), where both hold the same problems in order.

    Shapes: a [N], b [N] -> (low, high).
    Raises: ValueError for lengths that differ, and as `bootstrap_interval`.
    """
    if len(a) != len(b):
        raise ValueError(f"a, b: must hold the same problems, got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Student's t-interval of a mean over few independent runs, such as one for each seed.

    Shapes: values [N], N >= 2 -> (low, high).
    Raises: ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"values: must be at least two, got {len(values)}")
    degrees = len(values) - 1
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # Halving: the chance grows with the angle.
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < level else (low, middle)
    half = math.sqrt(degrees) * math.tan(low) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def _t_within(angle: float, degrees: int) -> float:
    """The chance that Student's |t| is at most sqrt(degrees) * tan(angle).

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, linear between neighbours."""
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
