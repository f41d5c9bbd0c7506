"""What graded responses say: accuracy, pass@k, lengths, diversity, and differences of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from gft_lite.rewards.choice_rule import chosen_letter
from gft_lite.rewards.extract import stated_answer
from gft_lite.rewards.latex import text_key
from gft_lite.types import Group, Response
from gft_lite.utils.statistics import (
    average_interval,
    bootstrap_interval,
    mean_pass_at_k,
    paired_interval,
    pass_at_k,
)

_AVERAGED = ("truncated", "no_answer", "length", "distinct")
CORRECT = 0.5  # A score above this, of the recipe's first reward function, is a right answer.


def measure(groups: Sequence[Group], ks: Sequence[int]) -> dict[str, Any]:
    """pass@k with a 95% interval of pass@1, shares of truncated and unanswered, lengths."""
    counts = [(len(g), sum(map(correct, g))) for g in groups]
    responses = [r for g in groups for r in g]
    accuracies = [pass_at_k(n, c, 1) for n, c in counts]
    return {
        **{f"pass@{k}": mean_pass_at_k(counts, k) for k in sorted({1, *ks})},
        "pass@1_interval": bootstrap_interval(accuracies),
        "truncated": sum(r.truncated for r in responses) / len(responses),
        "no_answer": sum(r.verdict == "no_answer" for r in responses) / len(responses),
        "length": sum(len(r.token_ids) for r in responses) / len(responses),
        "problems": len(groups),
        "samples": len(responses),
        "correct": {g.problem.id: c for g, (_, c) in zip(groups, counts, strict=True)},
    }


def score(response: Response) -> float:
    """What the first reward function gave; it decides what a right answer is."""
    return next(iter(response.reward_parts.values()), 0.0)


def correct(response: Response) -> bool:
    """Whether a graded response is a right answer."""
    return score(response) > CORRECT


def headline(results: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> dict[str, float]:
    """The figures of the final table: pass@k of the first set, pass@1 of each further one."""
    names = list(results)
    figures = {f"pass@{k}": results[names[0]][f"pass@{k}"] for k in ks} if names else {}
    for name in names[1:]:
        figures[name] = results[name]["pass@1"]
    return figures


def distinct(groups: Sequence[Group], marker: str | None = None) -> float:
    """How many different answers the responses to a problem state, as written, on average.

    `marker` is what stands before an answer, where that isn't a box or a phrase.
    """

    def stated(text: str, kind: object) -> str | None:
        if marker:
            return text.rpartition(marker)[2].strip() if marker in text else None
        answer = chosen_letter(text) if kind == "choice" else stated_answer(text)
        return answer and text_key(answer[:1000])

    answers = ({stated(r.text, g.problem.columns.get("answer_type")) for r in g} for g in groups)
    return fmean(len(each - {None}) for each in answers)


def _accuracies(figures: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy on each problem, by its id."""
    samples = figures["samples"] / figures["problems"]
    return {name: correct / samples for name, correct in figures["correct"].items()}


def average(benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over benchmarks, all of which weigh the same."""
    names = {n: None for f in benchmarks.values() for n in f if n.startswith("pass@")}
    means = {
        name: fmean(figures[name] for figures in benchmarks.values())
        for name in [*(n for n in names if n != "pass@1_interval"), *_AVERAGED]
    }
    accuracies = [list(_accuracies(figures).values()) for figures in benchmarks.values()]
    return {**means, "pass@1_interval": average_interval(accuracies)}


def compare(
    a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Accuracy of b minus a on the problems of each benchmark that both answered, and on average.

    The interval is the paired bootstrap's over problems.
    """
    found: dict[str, dict[str, Any]] = {}
    gains: list[list[float]] = []
    for name in (name for name in a if name in b):
        before, after = _accuracies(a[name]), _accuracies(b[name])
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
