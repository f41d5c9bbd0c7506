"""How far the policy has moved: KL to the frozen reference by adapter-swap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gft_lite.batching import Row, cut
from gft_lite.objective import k3
from gft_lite.policy import Policy
from gft_lite.types import Group


def group_rows(groups: Iterable[Group]) -> list[Row]:
    """The self samples of groups as rows to score."""
    return [
        Row(group.problem.prompt_ids, response.token_ids)
        for group in groups
        for response in group
        if response.source == "self"
    ]


def divergence(policy: Policy, rows: Sequence[Row], token_budget: int) -> dict[str, float]:
    """Means per response token of policy against reference, in nats.

    `forward` is KL(reference || policy), `reverse` KL(policy || reference), both exact over the
    vocabulary at the given tokens. On the reference's own samples `forward_sample` estimates
    the first (as the authors' evaluation does); on the policy's own samples `reverse_k3` the
    second. Empty without rows.
    """
    totals = {"forward": 0.0, "reverse": 0.0, "forward_sample": 0.0, "reverse_k3": 0.0}
    tokens = 0
    training = policy.model.training
    policy.model.eval()
    for batch in cut(rows, token_budget, pad_id=policy.pad_id):
        found = policy.divergence(batch)
        tokens += found.logprobs.numel()
        totals["forward"] += found.forward.sum().item()
        totals["reverse"] += found.reverse.sum().item()
        totals["forward_sample"] += (found.ref_logprobs - found.logprobs).sum().item()
        totals["reverse_k3"] += k3(found.logprobs, found.ref_logprobs).sum().item()
    policy.model.train(training)
    return {name: total / tokens for name, total in totals.items()} if tokens else {}
