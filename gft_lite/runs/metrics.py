"""The metrics of a training step that follow from its graded groups, and a timer of its phases."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gft_lite.types import Group

PHASES = ("rollout", "reward", "train", "sync")  # Of training, without evaluations.


class PhaseTimer:
    """Wall-clock seconds by phase: `with timer("rollout"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start


def group_metrics(groups: Sequence[Group]) -> dict[str, Any]:
    """Mean rewards by source and by reward function, shares and lengths of graded groups.

    Responses to which no reward function applies are left out of the means of rewards.
    """
    responses = [r for group in groups for r in group]
    own = [r for r in responses if r.source == "self"]
    by_source: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    for group in groups:
        for response, reward in zip(group, group.rewards, strict=True):
            if reward is not None:
                by_source.setdefault(response.source, []).append(reward)
            for name, value in response.reward_parts.items():
                parts.setdefault(name, []).append(value)
    return {
        "groups": len(groups),
        "trajectories": len(responses),
        "sources": dict(Counter(r.source for r in responses)),
        "reward": {source: _mean(values) for source, values in by_source.items()},
        "reward_parts": {name: _mean(values) for name, values in parts.items()},
        "verdicts": dict(sorted(Counter(r.verdict or "none" for r in responses).items())),
        "flat_groups": _mean([group.flat for group in groups]),
        "truncated": _mean([r.truncated for r in responses]),
        "length": _mean([len(r.token_ids) for r in own]),
        "tokens": sum(len(r.token_ids) for r in responses),
    }


def training_seconds(step: Mapping[str, Any]) -> float:
    """The time that the training phases of a step took, by its metrics."""
    return sum(step["seconds"].get(phase, 0.0) for phase in PHASES)


def count_self_tokens(groups: Sequence[Group]) -> int:
    """The tokens of all self samples."""
    return sum(len(r.token_ids) for group in groups for r in group if r.source == "self")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
