"""Unbiased pass@k, bootstrap intervals over problems, Student's t over seeds, Holm's p values."""

from __future__ import annotations

import math
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
    import numpy as np  # Here, so that what only reads results need not wait for it.

    # The draws of `random.Random(seed).choices`, many times faster. `scipy.stats.bootstrap` would
    # draw others for the same seed, rejects a single problem, and takes half a second to import.
    draw = np.random.RandomState([seed]).random_sample
    arrays = [np.asarray(values, dtype=float) for values in groups]
    means = [
        fmean(float(a[(draw(len(a)) * len(a)).astype(int)].mean()) for a in arrays)
        for _ in range(resamples)
    ]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
    from scipy.special import stdtrit  # `scipy.stats.t` is this, at four times the import time.

    half = stdtrit(len(values) - 1, (1 + level) / 2) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - float(half), fmean(values) + float(half)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted for their number: of one at most 0.05, any false one is as rare as 5%.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979. scipy has no
    function for it.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
