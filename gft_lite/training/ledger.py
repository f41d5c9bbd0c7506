"""The token ledger (`log.tokens`): what the loss made of each token of a step's first groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from gft_lite.data.token_texts import token_texts
from gft_lite.policy.base import without_dropout
from gft_lite.policy.batching import Row
from gft_lite.runs.folder import RunFolder
from gft_lite.training.learner import Learner
from gft_lite.types import SOURCES, ScoredGroup

GROUPS = 8  # Of each step.


def record_tokens(
    learner: Learner, folder: RunFolder, step: int, groups: Sequence[ScoredGroup]
) -> None:
    """Write a step's record, before its first update.

    Passes of its own compute it, so that a step computes the same with it as without. The sources'
    gradients are those of the first step and of every `monitor.every`-th.
    """
    progress, every = learner.budget_fraction(step - 0.5), learner.recipe.monitor.every
    with torch.random.fork_rng(), without_dropout(learner.policy):
        record = {
            "groups": _tokens(learner, groups[:GROUPS], progress),
            "gradients": _gradients(learner, groups, progress)
            if step == 1 or (every and step % every == 0)
            else None,
        }
    folder.write_tokens(step, record)


def _tokens(
    learner: Learner, groups: Sequence[ScoredGroup], progress: float
) -> list[dict[str, Any]]:
    """Each group as JSON: of each response that is trained on its tokens' figures, else None."""
    rows = learner.prepare_rows(learner.rows(groups))
    figures = _figures(learner, rows, progress)
    tokenizer, found, at = learner.policy.tokenizer, [], 0
    for scored in groups:
        responses: list[dict[str, Any] | None] = []
        for response, advantage in scored:
            # Rows are in the order of the responses, without those that are left out.
            row = rows[at] if at < len(rows) else None
            known = (scored.group.problem.prompt_ids, response.token_ids, advantage)
            if row is None or (row.prompt_ids, row.response_ids, row.advantage) != known:
                responses.append(None)
                continue
            entry = {"source": response.source, "prefix": response.prefix,
                     "advantage": advantage}  # fmt: skip
            texts = token_texts(tokenizer, response.token_ids)
            responses.append({**entry, "text": texts, **figures[at]})
            at += 1
        found.append({"problem": scored.group.problem.id, "responses": responses})
    return found


def _figures(learner: Learner, rows: Sequence[Row], progress: float) -> list[dict[str, Any]]:
    """Of each row, for each token [R], its log-probs in nats and its coefficient.

    The coefficient is -d loss / d log p of the token's own loss, without the weight of the
    reduction: A C(p) for GFT. Of a loss with parts it is that of the parts the token is in.
    """
    found: list[dict[str, Any]] = [{} for _ in rows]
    for batch in learner.make_micro_batches(rows):
        batch = batch.to(learner.policy.device)
        with torch.no_grad():
            needs_kl = "reference_kl" in learner.method.needs
            scores = learner.policy.token_scores(batch, reference_kl=needs_kl)
            with learner.policy.base():
                base = learner.policy.token_scores(batch).logprobs
        logprobs = scores.logprobs.detach().requires_grad_()
        reference = learner.loss.reference_logprobs(batch)
        output = learner.loss(
            batch, replace(scores, logprobs=logprobs), reference=reference, progress=progress
        )
        inside = (output.per_token * (batch.weights != 0)).sum()
        [slope] = torch.autograd.grad(inside, [logprobs], materialize_grads=True)
        engine = batch.loss_inputs.get("engine_logprobs")
        values = {
            "logprob": logprobs.detach(),
            "engine": torch.full_like(slope, math.nan) if engine is None else engine,
            "base": base,
            "coefficient": -slope,
        }
        for name, value in values.items():
            for i, of_row in batch.by_row(value).items():
                found[i][name] = _rounded(of_row)
    return found


def _gradients(learner: Learner, groups: Sequence[ScoredGroup], progress: float) -> dict[str, Any]:
    """The norm of the gradient of each source's rows, and the cosine of each two.

    Rows have the weights that they have in the step, so that the gradients add up to its own.
    The prefix of a row belongs to the row's source.
    """
    rows = learner.prepare_rows(learner.rows(groups))
    gradients: dict[str, Tensor] = {}
    for number, source in enumerate(SOURCES):
        if own := [row for row in rows if row.source == number]:
            learner.gradient(own, progress)
            gradients[source] = torch.cat([*_gradient_tensors(learner)]).double().cpu()
    learner.policy.model.zero_grad(set_to_none=True)
    norms = {source: gradient.norm().item() for source, gradient in gradients.items()}
    cosines = {
        f"{one}, {other}": torch.nn.functional.cosine_similarity(
            gradients[one], gradients[other], dim=0
        ).item()
        for one, other in combinations(gradients, 2)
        if norms[one] and norms[other]
    }
    return {"norms": _finite(norms), "cosines": _finite(cosines)}


def _gradient_tensors(learner: Learner) -> Iterator[Tensor]:
    for parameter in learner.policy.parameters().values():
        grad = parameter.grad
        yield (torch.zeros_like(parameter) if grad is None else grad).detach().flatten()


def _rounded(values: Tensor) -> list[float | None]:
    """Values with five digits, None for NaN and infinity, which JSON does not have."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()]


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
