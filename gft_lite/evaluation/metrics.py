"""Figures of evaluated sets: pass@k, mean reward or likelihood, lengths, and differences.

Where a reward function decides correctness, the figures of a set are pass@k and `correct`, the
number of correct responses by problem; otherwise they are `mean_reward` and `rewards`, the mean
reward by problem. Of a set without answers they are `nll`, the mean negative log-likelihood per
demonstration token, with the `nats` and `tokens` of the demonstrations by problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from gft_lite.recipe.figures import FIGURES, MEAN_REWARD, NLL, compared, figure_of, main_figure
from gft_lite.rewards.base import RewardError
from gft_lite.rewards.choice_rule import chosen_letter
from gft_lite.rewards.extract import stated_answer
from gft_lite.rewards.latex import text_key
from gft_lite.types import Group
from gft_lite.utils.statistics import (
    average_interval,
    bootstrap_interval,
    mean_pass_at_k,
    paired_interval,
    pass_at_k,
)

_LARGEST_EXPONENT = 700.0  # Whose exponential is a float.
_AVERAGED = tuple(figure.name for figure in FIGURES if figure.averaged)


def measure(groups: Sequence[Group], ks: Sequence[int]) -> dict[str, Any]:
    """The figures of a graded set, with 95% bootstrap intervals over its problems.

    Raises: RewardError if neither correctness nor any reward is known.
    """
    responses = [r for g in groups for r in g]
    graded = all(r.correct is not None for r in responses)
    return {
        **(_accuracy(groups, ks) if graded else _mean_reward(groups)),
        "truncated": sum(r.truncated for r in responses) / len(responses),
        "no_answer": sum(r.verdict == "no_answer" for r in responses) / len(responses),
        "length": sum(len(r.token_ids) for r in responses) / len(responses),
        "problems": len(groups),
        "samples": len(responses),
    }


def _accuracy(groups: Sequence[Group], ks: Sequence[int]) -> dict[str, Any]:
    counts = {g.problem.id: (len(g), sum(bool(r.correct) for r in g)) for g in groups}
    return _accuracy_of_counts(counts, ks)


def _accuracy_of_counts(counts: Mapping[str, tuple[int, int]], ks: Sequence[int]) -> dict[str, Any]:
    return {
        **{f"pass@{k}": mean_pass_at_k(list(counts.values()), k) for k in sorted({1, *ks})},
        "pass@1_interval": bootstrap_interval([pass_at_k(n, c, 1) for n, c in counts.values()]),
        "correct": {name: correct for name, (_, correct) in counts.items()},
    }


def _mean_reward(groups: Sequence[Group]) -> dict[str, Any]:
    """The mean over problems of their mean rewards; responses without a reward do not count."""
    known = {g.problem.id: [r.reward for r in g if r.reward is not None] for g in groups}
    return _mean_of_rewards(
        {name: fmean(values) for name, values in known.items() if values}, sum(map(len, groups))
    )


def _mean_of_rewards(rewards: Mapping[str, float], responses: int) -> dict[str, Any]:
    if not rewards:
        raise RewardError(
            "rewards: must apply to at least one response of an evaluation, got None for all "
            f"{responses}. Return numbers, or use a rule that compares the answer."
        )
    return {
        MEAN_REWARD: fmean(rewards.values()),
        f"{MEAN_REWARD}_interval": bootstrap_interval(list(rewards.values())),
        "rewards": dict(rewards),
    }


def likelihood(nats: Mapping[str, float], tokens: Mapping[str, int]) -> dict[str, Any]:
    """The figures of a set whose demonstrations have these NLLs and lengths, by problem."""
    nll = sum(nats.values()) / sum(tokens.values())
    figures = {NLL: nll, "perplexity": math.exp(min(nll, _LARGEST_EXPONENT)), "nats": dict(nats)}
    figures |= {"tokens": dict(tokens)}
    return {**figures, f"{NLL}_interval": bootstrap_interval([*by_problem(figures).values()])}


def restrict(figures: Mapping[str, Any], ids: Sequence[str], ks: Sequence[int]) -> dict[str, Any]:
    """The figures of some of a set's problems, by the same samples: those known by problem.

    Raises: RewardError if the problems have no reward.
    """
    if NLL in figures:
        parts = ({name: figures[part][name] for name in ids if name in figures[part]}
                 for part in ("nats", "tokens"))  # fmt: skip
        return {**likelihood(*parts), "problems": len(ids), "samples": 0}
    each = round(figures["samples"] / figures["problems"])
    sizes = {"problems": len(ids), "samples": each * len(ids)}
    if MEAN_REWARD in figures:
        rewards = {name: figures["rewards"][name] for name in ids if name in figures["rewards"]}
        return {**_mean_of_rewards(rewards, sizes["samples"]), **sizes}
    counts = {name: (each, figures["correct"][name]) for name in ids}
    return {**_accuracy_of_counts(counts, ks), **sizes}


def by_problem(figures: Mapping[str, Any], name: str | None = None) -> dict[str, float]:
    """A figure of each problem by its id, by default the main one.

    Empty if the set has no such figure. A problem's `nll` is linearised at the set's, so that the
    mean over problems is the mean over tokens, and its interval that of a ratio.
    """
    name = name or main_figure(figures)
    if name not in figures:
        return {}
    if name == MEAN_REWARD:
        return dict(figures["rewards"])
    if name == NLL:
        nll, tokens = figures[NLL], figures["tokens"]
        mean = fmean(tokens.values())
        return {i: nll + (nats - nll * tokens[i]) / mean for i, nats in figures["nats"].items()}
    samples, k = round(figures["samples"] / figures["problems"]), int(name.removeprefix("pass@"))
    return {i: pass_at_k(samples, correct, k) for i, correct in figures["correct"].items()}


def headline(results: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> dict[str, float]:
    """The figures of summary.json: pass@k of the first set, pass@1 of each further one by name.

    Without correctness, `mean_reward` or `nll` of the first set and that of each further one.
    """
    if not results:
        return {}
    (_, first), *others = results.items()
    names = figure_of(main_figure(first)).names(ks)
    return {n: first[n] for n in names} | {n: f[main_figure(f)] for n, f in others}


def distinct(groups: Sequence[Group], marker: str | None = None) -> float:
    """The number of distinct answers per problem, compared as text; the mean over problems.

    `marker`: the text before an answer, where it is not in a box or after a phrase.
    """

    def stated(text: str, kind: object) -> str | None:
        if marker:
            return text.rpartition(marker)[2].strip() if marker in text else None
        answer = chosen_letter(text) if kind == "choice" else stated_answer(text)
        return answer and text_key(answer[:1000])

    answers = ({stated(r.text, g.problem.columns.get("answer_type")) for r in g} for g in groups)
    return fmean(len(each - {None}) for each in answers)


def average(benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over benchmarks, with equal weights."""
    all_figures = list(benchmarks.values())
    [main] = {main_figure(figures) for figures in all_figures}
    names = dict.fromkeys(n for f in all_figures for n in compared(f))
    values = [list(by_problem(figures).values()) for figures in all_figures]
    return {
        **{
            n: fmean(figures[n] for figures in all_figures)
            for n in [*names, *_AVERAGED]
            if n in all_figures[0]
        },
        f"{main}_interval": average_interval(values),
    }


def compare(
    a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The accuracy (or mean reward, or `nll`) of b minus that of a on their common problems.

    By benchmark, and "average" with equal weights; the intervals are paired bootstraps over
    problems.
    """
    found: dict[str, dict[str, Any]] = {}
    gains: list[list[float]] = []
    for name in (name for name in a if name in b):
        before, after = by_problem(a[name]), by_problem(b[name])
        shared = [problem for problem in after if problem in before]
        if shared:
            pair = [after[i] for i in shared], [before[i] for i in shared]
            gains.append([y - x for y, x in zip(*pair, strict=True)])
            found[name] = _gain(gains[-1:], paired_interval(*pair))
    return {**found, "average": _gain(gains, average_interval(gains))} if gains else {}


def _gain(gains: Sequence[Sequence[float]], interval: tuple[float, float]) -> dict[str, Any]:
    return {
        "difference": fmean(fmean(values) for values in gains),
        "interval": interval,
        "problems": sum(map(len, gains)),
    }
