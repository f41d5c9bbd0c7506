"""Accuracy and pass@k of whatever an engine serves, on named sets of problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gft_lite.groups import sample
from gft_lite.passk import bootstrap_interval, mean_pass_at_k, pass_at_k
from gft_lite.prompts import PromptFormat
from gft_lite.recipe import EvalSettings
from gft_lite.rewards.scorer import Scorer
from gft_lite.rollout import RolloutEngine, Sampling
from gft_lite.types import Group, Problem, Response

CORRECT = 0.5  # A score above this, of the recipe's first reward function, is a right answer.


def evaluate(
    engine: RolloutEngine,
    format: PromptFormat,
    scorer: Scorer,
    sets: Mapping[str, Sequence[Problem]],
    settings: EvalSettings,
    max_tokens: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Sample and grade every set; the same seeds for every model, so that pairs compare."""
    sampling = Sampling(settings.temperature, settings.top_p, max_tokens=max_tokens)
    return {
        name: measure(_answer(engine, format, scorer, name, problems, settings, sampling, seed),
                      settings.k)
        for name, problems in sets.items()
    }  # fmt: skip


def _answer(
    engine: RolloutEngine,
    format: PromptFormat,
    scorer: Scorer,
    name: str,
    problems: Sequence[Problem],
    settings: EvalSettings,
    sampling: Sampling,
    seed: int,
) -> list[Group]:
    counts = [settings.samples] * len(problems)
    responses = sample(engine, format, problems, counts, sampling, (seed, "eval", name))
    return scorer.score([Group(p, r) for p, r in zip(problems, responses, strict=True)])


def measure(groups: Sequence[Group], ks: Sequence[int]) -> dict[str, Any]:
    """pass@k with a 95% interval of pass@1, shares of truncated and unanswered, lengths."""
    counts = [(len(g), sum(_score(r) > CORRECT for r in g)) for g in groups]
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


def _score(response: Response) -> float:
    return next(iter(response.reward_parts.values()), 0.0)


def headline(results: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> dict[str, float]:
    """The figures of the final table: pass@k of the first set, pass@1 of each further one."""
    names = list(results)
    figures = {f"pass@{k}": results[names[0]][f"pass@{k}"] for k in ks} if names else {}
    for name in names[1:]:
        figures[name] = results[name]["pass@1"]
    return figures
