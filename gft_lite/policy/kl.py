"""KL divergence of the policy to the frozen reference, by switching the adapter off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from gft_lite.objective.losses import k3
from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.batching import Row
from gft_lite.types import Group
from gft_lite.utils.progress import track


def group_rows(groups: Iterable[Group]) -> list[Row]:
    """The self samples of groups as rows to score."""
    return [
        Row(group.problem.prompt_ids, response.token_ids)
        for group in groups
        for response in group
        if response.source == "self"
    ]


def divergence(
    policy: Policy, rows: Sequence[Row], token_budget: int, *, samples_of: str
) -> dict[str, float]:
    """Means per response token of policy against reference, in nats; empty without rows.

    `forward` is KL(reference || policy) and `reverse` KL(policy || reference), both exact over
    the vocabulary at the given tokens. With samples_of="reference" there is also `forward_sample`,
    the estimate of the authors' evaluation, with samples_of="policy" `reverse_k3`.
    """
    exact = {"forward": 0.0, "reverse": 0.0}
    estimate, tokens = 0.0, 0
    with evaluating(policy):
        for batch in track(policy.batches(rows, token_budget), "micro-batches"):
            found = policy.divergence(batch)
            tokens += found.logprobs.numel()
            exact["forward"] += found.forward.sum().item()
            exact["reverse"] += found.reverse.sum().item()
            if samples_of == "reference":
                estimate += (found.ref_logprobs - found.logprobs).sum().item()
            else:
                estimate += k3(found.logprobs, found.ref_logprobs).sum().item()
    name = "forward_sample" if samples_of == "reference" else "reverse_k3"
    return {n: v / tokens for n, v in {**exact, name: estimate}.items()} if tokens else {}


def entropy(policy: Policy, rows: Sequence[Row], token_budget: int) -> float | None:
    """The mean entropy per response token of the model as it is, in nats; None without rows."""
    total, tokens = 0.0, 0
    with torch.no_grad(), evaluating(policy):
        for batch in track(policy.batches(rows, token_budget), "micro-batches"):
            found = policy.token_scores(batch).entropy
            total += found.sum().item()
            tokens += found.numel()
    return total / tokens if tokens else None
