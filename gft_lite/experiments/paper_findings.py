"""The paper's findings that the lab study tests and the decision rule, fixed before it ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Literal

from gft_lite.utils.statistics import t_interval

Verdict = Literal["reproduced", "not reproduced", "undecided"]

RULE = """\
A finding names pairs of settings, the one that the paper finds better first, and a figure. Runs
of the same base and seed are compared with each other: the mean of their differences has a 95%
interval (Student's t over the runs). **Reproduced**: for every pair of the finding, the interval
lies wholly on the paper's side of 0. **Not reproduced**: for at least one pair it lies wholly on
the other side. **Undecided**: anything else.\
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim of arXiv 2604.14258 as pairs (better, worse) of settings, compared by a figure."""

    where: str
    claim: str
    pairs: tuple[tuple[str, str], ...]
    figure: str = "pass@1"
    lower_is_better: bool = False


def _beats(where: str, claim: str, better: str, *worse: str, figure: str = "pass@1") -> Finding:
    return Finding(where, claim, tuple((better, each) for each in worse), figure)


_RATIO_ENDS = ("ratio 0:8", "ratio 8:0")
_RATIO_MIDDLE = ("ratio 6:2", "ratio 4:4", "ratio 2:6")

FINDINGS = (
    *(_beats("Table 1", f"GFT is more accurate than {m.upper()}", "gft", m)
      for m in ("sft", "dft", "asft", "psft", "grpo")),
    _beats("Table 1", "GFT is more accurate than SFT on as many expert solutions",
           "gft", "sft_few"),
    _beats("Table 2", "GFT is worse without group advantages", "gft", "gft_no_gal"),
    _beats("Table 2", "GFT is worse without rectification", "gft", "gft_no_dcr"),
    _beats("Table 2", "GFT is worse without mixed demonstrations", "gft", "gft_no_mix"),
    _beats("Figure 4", "GFT is a better start for GRPO than SFT", "gft > grpo", "sft > grpo"),
    _beats("Table 3", "GFT keeps old skills better than SFT", "gft", "sft", figure="retention"),
    Finding("Figure 5", "GFT stays nearer to the base than SFT", (("gft", "sft"),), "kl", True),
    *(_beats("Table 4", f"GFT solves more in many samples than {m.upper()}", "gft", m,
             figure="pass@16") for m in ("sft", "grpo")),
    _beats("Table 5", "The best ratio is 2:6",
           "ratio 2:6", "ratio 0:8", "ratio 4:4", "ratio 6:2", "ratio 8:0"),
    Finding("Table 5", "The worst ratios are 0:8 and 8:0",
            tuple(product(_RATIO_MIDDLE, _RATIO_ENDS))),
    _beats("Figure 6", "tau = 0.7 is better than none (0) and than 1", "tau 0.7", "tau 0", "tau 1"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """The mean difference better - worse of a finding's pair, and its interval."""

    better: str
    worse: str
    mean: float
    low: float
    high: float


BySetting = Mapping[str, Mapping[tuple[str, int], Mapping[str, float]]]


def compare(runs: BySetting, better: str, worse: str, figure: str) -> Comparison | None:
    """The difference of two settings over the runs that both have, None if fewer than two."""
    a, b = (
        {run: figures[figure] for run, figures in runs.get(name, {}).items() if figure in figures}
        for name in (better, worse)
    )
    differences = [a[run] - b[run] for run in a if run in b]
    if len(differences) < 2:
        return None
    low, high = t_interval(differences)
    return Comparison(better, worse, fmean(differences), low, high)


def judge(finding: Finding, runs: BySetting) -> tuple[Verdict, list[Comparison]] | None:
    """The verdict on a finding and its comparisons; None if a pair has not been run."""
    found = [compare(runs, *pair, finding.figure) for pair in finding.pairs]
    comparisons = [each for each in found if each]
    if len(comparisons) < len(finding.pairs):
        return None
    above = [c.low > 0 for c in comparisons]
    below = [c.high < 0 for c in comparisons]
    claimed, opposite = (below, above) if finding.lower_is_better else (above, below)
    if all(claimed):
        return "reproduced", comparisons
    return ("not reproduced" if any(opposite) else "undecided"), comparisons
