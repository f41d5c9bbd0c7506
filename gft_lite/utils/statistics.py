"""Unbiased pass@k; bootstrap intervals over problems and Student's t intervals over seeds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean, stdev


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that at least one of k samples is correct, estimated from n samples.

    Source: arXiv 2107.03374, Eq. 1, `1 - C(n - c, k) / C(n, k)`, in exact integers with a single
    division, which neither overflows nor loses small probabilities.

    Raises: ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct: must be from 0 to n = {n}, got {correct}")
    if not 1 <= k <= n:
        raise ValueError(f"k: must be from 1 to n = {n}, got {k}")
    draws = math.comb(n, k)
    return (draws - math.comb(n - correct, k)) / draws


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """The mean pass@k over problems, each given as `(n, correct)`.

    Raises: ValueError without problems, and as `pass_at_k`.
    """
    if not counts:
        raise ValueError("counts: must hold at least one problem, got none")
    return fmean(pass_at_k(n, correct, k) for n, correct in counts)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over problems, deterministic for a seed.

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
    """The bootstrap interval of the mean over benchmarks of each benchmark's mean.

    Problems are resampled within their benchmark; all benchmarks have equal weight.
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
    """The bootstrap interval of mean(a) - mean(b) over the same problems in the same order.

    Shapes: a [N], b [N] -> (low, high).
    Raises: ValueError for lengths that differ, and as `bootstrap_interval`.
    """
    if len(a) != len(b):
        raise ValueError(f"a, b: must hold the same problems, got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of a mean over independent runs, such as one per seed.

    Shapes: values [N], N >= 2 -> (low, high).
    Raises: ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"values: must be at least two, got {len(values)}")
    degrees = len(values) - 1
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # Bisection: the probability increases with the angle.
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < level else (low, middle)
    half = math.sqrt(degrees) * math.tan(low) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def _t_within(angle: float, degrees: int) -> float:
    """The probability that Student's |t| is at most sqrt(degrees) * tan(angle).

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
    """The q-quantile of sorted values, interpolated linearly."""
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
