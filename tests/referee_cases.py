"""Comparisons with known truth for the tests of the referee's verdict and page."""

from __future__ import annotations

import numpy as np

from gft_lite.experiments.outcomes import Comparison, Cost, Failure, Outcome, TuningPoint


def outcome(method, seed, scores, *, base="lab", base_scores=None, kl=0.1, **cost):
    """A run; `scores` are values by set, each a list over problems or a dict."""

    def named(sets):
        return {
            name: values if isinstance(values, dict) else {f"q{i}": v for i, v in enumerate(values)}
            for name, values in sets.items()
        }

    figures = {
        "trajectories": 64, "trained_tokens": 1000, "rollout_tokens": 500, "peak_memory": 0.5,
        "seconds": {"total": 30.0, "train": 20.0, "eval": 5.0},
    }  # fmt: skip
    return Outcome(
        method, base, seed, {"optim.lr": 0.001}, named(scores), named(base_scores or {}),
        {"pass@1": 0.5}, kl, Cost(**{**figures, **cost}), f"runs/{method}-{seed}",
    )  # fmt: skip


def comparison(outcomes, **fields):
    """A comparison of the outcomes' methods with `sft` on the set `test`."""
    outcomes = tuple(outcomes)
    methods = tuple(dict.fromkeys(["sft", *(o.method for o in outcomes)]))
    return Comparison(**{
        "name": "demo", "methods": methods, "against": "sft", "headline": "test", "retention": (),
        "margin": 0.02, "outcomes": outcomes, "tuning": (), "failures": (), "design": {},
        "recipes": {}, **fields,
    })  # fmt: skip


def simulated(gains, *, runs=3, problems=100, samples=8, seed_sd=0.02, seed=0, **fields):
    """Runs of sft and of methods with known gains, on `test` and on the retention set `old`.

    Costs, KL and retention grow with the place of the method.
    """
    draw = np.random.default_rng(seed)
    easy = draw.uniform(0.2, 0.7, problems)
    outcomes = []
    for place, (method, gain) in enumerate({"sft": 0.0, **gains}.items()):
        of_problem = draw.normal(0, 0.08, problems)
        for run in range(runs):
            p = np.clip(easy + of_problem + gain + draw.normal(0, seed_sd), 0, 1)
            kept = np.clip(easy - 0.02 * place + draw.normal(0, seed_sd), 0, 1)
            scores = {"test": draw.binomial(samples, p) / samples,
                      "old": draw.binomial(samples, kept) / samples}  # fmt: skip
            outcomes.append(outcome(
                method, run, {name: values.tolist() for name, values in scores.items()},
                base_scores={"test": (easy - 0.1).tolist(), "old": easy.tolist()},
                kl=0.05 + 0.1 * place + draw.uniform(0, 0.05),
                trained_tokens=20_000 + 15_000 * place, rollout_tokens=40_000 * place,
                seconds={"total": 30.0 + 40 * place, "rollout": 25.0 * place, "eval": 5.0},
            ))  # fmt: skip
    return comparison(outcomes, **{"retention": ("old",), **fields})


def tuned(method, field, scores, chosen):
    """The tuning points of a method: scores by value, None for a failure."""
    return tuple(
        TuningPoint(method, field, {field: value}, score, value == chosen)
        for value, score in scores.items()
    )


def failure(method, reason, part="main", run="runs/x"):
    """A run that failed."""
    return Failure(method, part, run, reason)
