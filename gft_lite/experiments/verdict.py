"""Which methods are better than another one, by rules that are fixed before the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from gft_lite.experiments.outcomes import Comparison, Outcome
from gft_lite.utils.paired_difference import LEVEL, PairedDifference, paired_difference
from gft_lite.utils.statistics import holm
from gft_lite.utils.tables import Table

Word = Literal["better", "worse", "lower", "higher", "equal within the margin", "not separable",
               "not compared"]  # fmt: skip
KL = "KL"
MANY = 5  # Sentences of a kind; more of them become one.
_ALPHA = 1 - LEVEL
_Values = Mapping[tuple[str, int], Mapping[str, float]]  # By base and seed, then by problem.


@dataclass(frozen=True, slots=True)
class Verdict:
    """A method compared with `against` on an evaluation set, or by KL.

    Differences, intervals and the detectable difference are shares, or nats per token; None where
    there is no interval; `detectable_with_6` is that of 6 seeds, None where there were as many or
    no two. `p` and `equal_p` are adjusted for the number of methods. `over` says what
    the interval covers: `bases and problems`, `seeds and problems` or `problems only`.
    """

    method: str
    against: str
    measure: str
    word: Word
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    equal_p: float | None = None
    detectable: float | None = None
    detectable_with_6: float | None = None
    runs: int = 0
    problems: int = 0
    over: str = ""
    reason: str = ""


def judge(comparison: Comparison) -> dict[str, tuple[Verdict, ...]]:
    """The verdicts on every method but `against`: by the headline set, retention sets and `KL`."""
    measures: dict[str, Callable[[Outcome], Mapping[str, float] | None]] = {
        name: lambda outcome, name=name: outcome.scores.get(name)  # type: ignore[misc]
        for name in (comparison.headline, *comparison.retention)
    }
    found = {name: _judge(comparison, name, read) for name, read in measures.items()}
    by_kl = _judge(comparison, KL, lambda one: None if one.kl is None else {KL: one.kl})
    return {**found, KL: by_kl} if any(o.kl is not None for o in comparison.outcomes) else found


def rules(comparison: Comparison) -> tuple[str, ...]:
    """The rules of the verdict as sentences."""
    margin, against = f"{100 * comparison.margin:g}", comparison.against
    return (
        f"Each method is compared with {against} on the same problems: the mean over problems of "
        "the difference of scores, over runs that share base and seed. Methods are compared only "
        "by pairs of runs that both finished.",
        "Intervals hold 95% and cover other problems and other seeds alike: the standard errors "
        "over runs and over problems (crossed random effects), each with its own Student's t "
        "quantile, are combined by the root of the sum of their squares, never narrower than over "
        "problems only. With several base "
        "models, the mean over the seeds of a base takes the place of a run, because runs of one "
        "base are not independent. With a single run, intervals cover problems only.",
        "p values are adjusted by Holm's method for the number of methods, separately for each "
        f"evaluation set and for KL. The verdict is on {comparison.headline}; the other sets are "
        "looked at beside it.",
        "better, worse: the adjusted p of no difference is at most 0.05. It claims a difference "
        "above 0, not one above the margin. For KL the words are lower and higher.",
        f"equal within the margin: the adjusted p of a difference of {margin} points or more is at "
        "most 0.05 (two one-sided tests: for a single method, the 90% interval lies inside of "
        f"+-{margin} points). It comes before better and worse: a difference that is certain, but "
        "certainly smaller than the margin, counts as none. KL has no margin.",
        "not separable: neither. The smallest difference is given that this design would have "
        "found about 4 times in 5 with the spread seen here.",
    )


def _judge(
    comparison: Comparison,
    measure: str,
    read: Callable[[Outcome], Mapping[str, float] | None],
) -> tuple[Verdict, ...]:
    """The verdicts by one measure, which `read` gets from an outcome: a value by problem."""
    values: dict[str, dict[tuple[str, int], Mapping[str, float]]] = {}
    for outcome in comparison.outcomes:
        if scores := read(outcome):
            values.setdefault(outcome.method, {})[outcome.base, outcome.seed] = scores
    reference = values.get(comparison.against, {})
    others = [method for method in comparison.methods if method != comparison.against]
    estimates = {m: _Estimate.of(values.get(m, {}), reference) for m in others}
    usable = [method for method in others if estimates[method].usable]
    margin = 0.0 if measure == KL else comparison.margin
    ps = holm([float(estimates[m].difference.p_value()) for m in usable])
    equals = holm([float(estimates[m].difference.equivalence_p(margin)) for m in usable])
    adjusted = dict(zip(usable, zip(ps, equals, strict=True), strict=True))
    verdicts = []
    for method in others:
        empty = Verdict(method, comparison.against, measure, "not compared")
        verdicts.append(
            _verdict(empty, estimates[method], *adjusted[method], len(usable))
            if method in adjusted
            else replace(empty, reason=_why_not(method, comparison, values))
        )
    return tuple(verdicts)


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A paired difference with what it is over."""

    difference: PairedDifference
    runs: int
    over: str

    @property
    def usable(self) -> bool:
        return self.runs > 0

    @classmethod
    def of(cls, method: _Values, against: _Values) -> _Estimate:
        pairs = sorted(method.keys() & against.keys())
        tables = [side[pair] for pair in pairs for side in (method, against)]
        problems = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        if not problems:
            return cls(PairedDifference(np.nan, 0.0, 0.0, 0.0, 0, 0), 0, "")
        by_base: dict[str, list[list[float]]] = {}
        for base, seed in pairs:
            a, b = method[base, seed], against[base, seed]
            by_base.setdefault(base, []).append([a[name] - b[name] for name in problems])
        several = len(by_base) > 1
        table = (
            [np.mean(runs, axis=0) for runs in by_base.values()] if several
            else next(iter(by_base.values()))
        )  # fmt: skip
        over = "bases and problems" if several else "seeds and problems"
        return cls(
            paired_difference(table), len(pairs), over if len(table) > 1 else "problems only"
        )


def _verdict(
    empty: Verdict, estimate: _Estimate, p: float, equal_p: float, methods: int
) -> Verdict:
    difference = estimate.difference
    mean = float(difference.mean)
    words: tuple[Word, Word] = ("lower", "higher") if empty.measure == KL else ("worse", "better")
    word: Word = "not separable"
    if equal_p <= _ALPHA:
        word = "equal within the margin"
    elif p <= _ALPHA:
        word = words[mean > 0]
    if not difference.known:
        return replace(
            empty, word="not separable", difference=mean, runs=estimate.runs,
            problems=difference.problems, reason="a single figure has no interval",
        )  # fmt: skip
    half = float(difference.half_width())
    return replace(
        empty, word=word, difference=mean, low=mean - half, high=mean + half, p=p,
        equal_p=None if empty.measure == KL else equal_p,
        detectable=float(difference.detectable(_ALPHA / methods)),
        detectable_with_6=(
            float(difference.with_runs(6).detectable(_ALPHA / methods))
            if estimate.over == "seeds and problems" and 1 < difference.runs < 6 else None
        ),
        runs=estimate.runs, problems=difference.problems, over=estimate.over,
    )  # fmt: skip


def _why_not(method: str, comparison: Comparison, values: Mapping[str, _Values]) -> str:
    against = comparison.against
    for name in (method, against):
        if all(outcome.method != name for outcome in comparison.outcomes):
            return f"no run of {name} finished"
        if name not in values:
            return f"{name} has no figures"
    return f"no run of {method} shares base, seed and problems with one of {against}"


# --- in words --------------------------------------------------------------------------------


def headline_sentences(comparison: Comparison, found: Sequence[Verdict]) -> list[str]:
    """The verdicts on the headline set in words; the first one is the answer."""
    order = ("better", "worse", "equal within the margin", "not separable", "not compared")
    ranked = sorted(found, key=lambda v: (order.index(v.word), -(v.difference or 0.0)))
    sentences = [_sentence(v, comparison.margin) for v in ranked if v.word != "not separable"]
    unsure = [verdict for verdict in ranked if verdict.word == "not separable"]
    place = sum(order.index(v.word) < order.index("not separable") for v in ranked)
    sentences[place:place] = _unsure(unsure, comparison)
    compared = [verdict for verdict in ranked if verdict.word != "not compared"]
    if compared and all(verdict.word == "not separable" for verdict in compared):
        if len(compared) > 1:
            text = f"No method is separable from {comparison.against} on {comparison.headline}."
            sentences.insert(0, text)
    elif not compared:
        sentences.insert(0, f"No method could be compared with {comparison.against}.")
    more = [v.detectable_with_6 for v in compared if v.word == "not separable"]
    if sizes := sorted(size for size in more if size is not None):
        low, high = (points(size, signed=False) for size in (sizes[0], sizes[-1]))
        sentences.append(
            f"With 6 seeds, differences of about {low if low == high else f'{low} to {high}'} "
            "points would be found."
        )
    if any(verdict.over == "problems only" for verdict in compared):
        sentences.append(
            "One run for each method: the intervals cover the choice of problems, not of seeds. "
            "Another seed may give another order."
        )
    return sentences


def _unsure(verdicts: Sequence[Verdict], comparison: Comparison) -> list[str]:
    """A sentence for each verdict that is not separable, or one for all of many."""
    if len(verdicts) <= MANY:
        return [_sentence(verdict, comparison.margin) for verdict in verdicts]
    names = ", ".join(
        v.method if v.difference is None else f"{v.method} ({points(v.difference)})"
        for v in verdicts
    )
    return [
        f"Not separable from {comparison.against} on {verdicts[0].measure} (difference in points): "
        f"{names}. The table has intervals, and what would have been found."
    ]


def _sentence(verdict: Verdict, margin: float) -> str:
    method, against, measure = verdict.method, verdict.against, verdict.measure
    if verdict.word == "not compared":
        return f"{method} is not compared: {verdict.reason}."
    if verdict.difference is None or verdict.low is None or verdict.high is None:
        return f"{method} is not separable from {against} on {measure}: {verdict.reason}."
    size = points(verdict.difference, signed=False)
    interval = f"[{points(verdict.low)}, {points(verdict.high)}]"
    if verdict.word in ("better", "worse"):
        small = min(abs(verdict.low), abs(verdict.high)) < margin
        doubt = f", which may be less than the margin of {100 * margin:g}" if small else ""
        return (
            f"{method} is {verdict.word} than {against} by {size} points {interval} "
            f"on {measure}{doubt}."
        )
    if verdict.word == "equal within the margin":
        return (
            f"{method} equals {against} within the margin of {100 * margin:g} points on "
            f"{measure}: {points(verdict.difference)} {interval}."
        )
    beside = verdict.low * verdict.high > 0  # The interval alone does not see the other methods.
    adjusted = f", p adjusted for all methods {p_text(verdict.p)}" if beside else ""
    return (
        f"{method} is not separable from {against} on {measure}: {points(verdict.difference)} "
        f"points {interval}{adjusted}; {_found(verdict.detectable or 0.0)}."
    )


def _found(detectable: float) -> str:
    if detectable >= 1:
        return "no difference of any size would have been found reliably"
    return f"about {points(detectable, signed=False)} points or more would have been found"


def points(share: float, *, signed: bool = True) -> str:
    """A share as percentage points, with its sign or as a size."""
    return f"{round(100 * share, 1) + 0.0:+.1f}" if signed else f"{abs(100 * share):.1f}"


def verdict_table(comparison: Comparison, found: Sequence[Verdict]) -> Table:
    """A row for each method, by one measure."""
    measure = found[0].measure if found else comparison.headline
    unit = "nats" if measure == KL else "points"
    header = ("method", "verdict", f"difference, {unit}", "95% interval", "p (Holm)",
              f"detectable, {unit}", "runs", "problems")  # fmt: skip
    rows = tuple(_row(verdict) for verdict in found)
    return Table(f"Compared with {comparison.against}: {measure}", header, rows, labels=2)


def _row(verdict: Verdict) -> tuple[str, ...]:
    of_kl = verdict.measure == KL
    difference, low, high = (
        figure_text(value, of_kl=of_kl) for value in (verdict.difference, verdict.low, verdict.high)
    )
    return (
        verdict.method, verdict.word, difference, "-" if low == "-" else f"{low} to {high}",
        p_text(verdict.p), figure_text(verdict.detectable, of_kl=of_kl, signed=False),
        str(verdict.runs), "-" if of_kl else str(verdict.problems),
    )  # fmt: skip


def figure_text(value: float | None, *, of_kl: bool, signed: bool = True) -> str:
    """A difference in points, or in nats for KL."""
    if value is None:
        return "-"
    if of_kl:
        return f"{value:+.3g}" if signed else f"{value:.3g}"
    return points(value, signed=signed)


def p_text(p: float | None) -> str:
    """A p value with two digits, at least 0.001."""
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.2g}"
