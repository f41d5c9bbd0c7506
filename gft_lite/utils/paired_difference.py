"""The mean difference of two methods over runs and problems: intervals, p values, power.

The differences D[r, p] = mu + run_r + problem_p + rest_rp are a table of runs times problems, both
drawn from larger populations (crossed random effects). The error of their mean has two independent
parts, each with a t interval of its own, which are combined by the root of the sum of their squares
(W. G. Howe, "Approximate confidence limits on the mean of X + Y", 1974):

- runs: the variance of the run means over R, with R - 1 degrees of freedom. It contains the rest.
- problems: that of the problem means over P, less the rest's part in it, with P - 1.

An interval over runs and problems is never narrower than that over problems only, which has the
rest's part: two run means can be equal by chance.

Simulated for 36 designs of 2 to 6 runs, 60 or 200 problems, 4 or 16 samples, and seeds that differ
by a standard deviation of 0 to 0.05, 1000 times each: 95% intervals covered the truth in 95% to
99%. Other ways to compute them covered less: Satterthwaite's degrees of freedom 90% to 98%, a
bootstrap over runs and problems 73% to 99%, Student's t over run means alone 73% to 96%, over
problems alone 43% to 96%. Mixed models by maximum likelihood covered 87% to 98% of 60 simulations
in 4 designs, and often did not converge. A variance between runs that is pooled over methods finds
more, but where one method varies more than the others it covered as little as 70%.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import nctdtrinc, stdtrit

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A mean, and the variance and degrees of freedom of the two parts of its error.

    `fixed_run_variance` is that over problems only. All figures are arrays of the same shape, or
    numbers. Without any variance that could be
    estimated (a single run on a single problem), `known` is False and intervals are NaN.
    """

    mean: Any
    run_variance: Any
    problem_variance: Any
    fixed_run_variance: Any
    runs: int
    problems: int

    @property
    def known(self) -> bool:
        """True if there is an interval."""
        return self.runs > 1 or self.problems > 1

    def half_width(self, level: Any = LEVEL) -> Any:
        """Half of the width of the two-sided interval of a level."""
        return self._half_width((1 - np.asarray(level, dtype=float))[()])

    def _half_width(self, alpha: Any) -> Any:
        """The half width by 1 - level, which is exact where the level is close to 1."""
        return self._combined(lambda degrees: stdtrit(degrees, alpha / 2))

    def _combined(self, quantile: Callable[[int], Any]) -> Any:
        """The root of the sum of the squares of each part's standard error times its quantile."""
        if not self.known:
            return np.full(np.shape(self.mean), np.nan)[()]
        of_runs = quantile(self.runs - 1) ** 2 * self.run_variance if self.runs > 1 else 0.0
        if self.problems == 1:
            return np.sqrt(of_runs)
        squared = quantile(self.problems - 1) ** 2
        both = of_runs + squared * self.problem_variance
        return np.sqrt(np.maximum(both, squared * self.fixed_run_variance))

    def p_value(self) -> Any:
        """The two-sided p value of no difference: 1 - the level whose interval ends at 0."""
        return self._p_of_distance(np.abs(self.mean))

    def equivalence_p(self, margin: float) -> Any:
        """The p value of a difference of `margin` or more, in either direction.

        Two one-sided tests (D. J. Schuirmann, 1987): at most 0.05 if the 90% interval lies inside
        of +-margin.
        """
        inside = margin - np.abs(self.mean)
        p = self._p_of_distance(np.abs(inside)) / 2
        return np.where(inside > 0, p, 1 - p)[()]

    def _p_of_distance(self, distance: Any) -> Any:
        if not self.known:
            return np.ones(np.shape(self.mean))[()]
        low, high = np.full(np.shape(distance), -100.0), np.zeros(np.shape(distance))
        for _ in range(60):  # Bisection of log10 p: the half width falls with p.
            middle = (low + high) / 2
            wider = self._half_width(10.0**middle) > distance
            low, high = np.where(wider, middle, low), np.where(wider, high, middle)
        # Without any variance, half widths are 0 and the signs decide: all of n are equal.
        exact = (self.run_variance == 0) & (self.fixed_run_variance == 0)
        of_signs = 2.0 ** (1 - (self.problems if self.problems > 1 else self.runs))
        return np.where(exact, np.where(distance > 0, of_signs, 1.0), 10.0**high)[()]

    def with_runs(self, runs: int) -> PairedDifference:
        """The figures that another number of runs would have with the same variances."""
        rest = self.fixed_run_variance - self.problem_variance
        return replace(
            self, runs=runs, run_variance=self.run_variance * self.runs / runs,
            fixed_run_variance=self.problem_variance + rest * self.runs / runs,
        )  # fmt: skip

    def detectable(self, alpha: float = 1 - LEVEL, power: float = 0.9) -> Any:
        """The difference that a test at `alpha` finds with probability `power`, approximately.

        The variances are estimates themselves: in simulations of 1 to 6 runs, differences of this
        size by power 0.9 were found in 74% to 90%, by power 0.8 in 62% to 82%.
        """
        return self._combined(lambda n: nctdtrinc(n, 1 - power, stdtrit(n, 1 - alpha / 2)))


def paired_difference(table: Any) -> PairedDifference:
    """The mean of a table of differences, and the variance of its mean by part.

    Shapes: table [..., R, P] -> figures [...].
    """
    table = np.asarray(table, dtype=float)
    runs, problems = table.shape[-2:]
    by_run, by_problem = table.mean(-1), table.mean(-2)
    mean = by_run.mean(-1)
    nothing = np.zeros(mean.shape)[()]
    of_runs = by_run.var(-1, ddof=1) / runs if runs > 1 else nothing
    of_problems = by_problem.var(-1, ddof=1) / problems if problems > 1 else nothing
    less_rest = of_problems
    if runs > 1 and problems > 1:
        rest = table - by_run[..., None] - by_problem[..., None, :] + mean[..., None, None]
        degrees = (runs - 1) * (problems - 1)
        rest_variance = (rest**2).sum((-2, -1)) / degrees / (runs * problems)
        less_rest = np.maximum(of_problems - rest_variance, 0.0)
    return PairedDifference(mean[()], of_runs, less_rest, of_problems, runs, problems)
