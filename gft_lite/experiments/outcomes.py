"""The outcome of one finished run of a comparison, as the verdict and the page read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Scores = Mapping[str, Mapping[str, float]]  # By evaluation set and problem: mean over the samples.


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took: responses and tokens, seconds by phase, peak memory in GiB (None: unknown).

    `seconds` has `total`, `eval` and the phases of training.
    """

    trajectories: int
    trained_tokens: int
    rollout_tokens: int
    seconds: Mapping[str, float]
    peak_memory: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: its method, base model and seed; runs that share base and seed are paired.

    `settings` are the tuned fields, such as `optim.lr`. `scores` are those of the trained policy,
    `base_scores` those of the policy before training, `figures` the headline figures of
    `summary.json`, `kl` the forward KL to the base on held-out prompts in nats per token. `folder`
    is relative to that of the comparison.
    """

    method: str
    base: str
    seed: int
    settings: Mapping[str, Any]
    scores: Scores
    base_scores: Scores
    figures: Mapping[str, float]
    kl: float | None
    cost: Cost
    folder: str


@dataclass(frozen=True, slots=True)
class TuningPoint:
    """A setting that was tried for a method; its score on the tuning set, None if it failed.

    `field` is the one that varied: `optim.lr` or the method's dial.
    """

    method: str
    field: str
    settings: Mapping[str, Any]
    score: float | None
    chosen: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that did not end: its method, what it was for (`tune` or `main`), and why."""

    method: str
    part: str
    run: str
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that a referee's verdict, tables and page are made of.

    `against` is the method that the others are compared with; `headline` and `retention` name
    evaluation sets. `margin` is the smallest difference worth having, as a share. `design` says
    what was run, as text by name, such as the budget, the grid of rates, versions and hardware.
    """

    name: str
    methods: tuple[str, ...]
    against: str
    headline: str
    retention: tuple[str, ...]
    margin: float
    outcomes: tuple[Outcome, ...]
    tuning: tuple[TuningPoint, ...]
    failures: tuple[Failure, ...]
    design: Mapping[str, str]
    recipes: Mapping[str, str]  # Of each method, as YAML.
