"""The likelihood of demonstrations, by which sets without answers are evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.metrics import likelihood
from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.batching import Row
from gft_lite.rollout.base import RolloutEngine
from gft_lite.types import Problem
from gft_lite.utils.progress import track


@contextmanager
def scoring(policy: Policy, engine: RolloutEngine, *, base: bool) -> Iterator[None]:
    """Let the policy, or with `base` its base, score with the engine's memory during a `with`.

    After an exception the engine stays asleep: the evaluation ends.
    """
    engine.sleep()
    with policy.base() if base else nullcontext():
        yield
    engine.wake()


def measure_likelihood(
    policy: Policy, format: PromptFormat, problems: Sequence[Problem], token_budget: int
) -> dict[str, Any]:
    """The figures of a set by the log-probs of its demonstrations, end tokens included.

    They are those of the policy as it is: of the base inside of `scoring(base=True)`.
    """
    owners = [(p, text) for p in problems for text in (*p.experts, *p.teachers)]
    rows = [Row(p.prompt_ids, format.response_ids(text)[0]) for p, text in owners]
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    with torch.no_grad(), evaluating(policy):
        for batch in track(policy.batches(rows, token_budget), "micro-batches"):
            logprobs = policy.token_scores(batch).logprobs.double().cpu()
            for i, values in batch.by_row(logprobs).items():
                name = owners[i][0].id
                nats[name] = nats.get(name, 0.0) - values.sum().item()
                tokens[name] = tokens.get(name, 0) + len(values)
    return {**likelihood(nats, tokens), "problems": len(problems), "samples": 0}
