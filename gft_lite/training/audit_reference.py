"""The gradient of a whole step from full logits, what `gft-lite audit` compares with.

It shares with the learner the method's per-token loss and the choice of rows, and nothing else: no
micro-batches, layouts, fused head, token weights or dropped rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gft_lite.objective.losses import LossInputs, k3
from gft_lite.objective.method import call_with_parameters
from gft_lite.objective.methods import find_method
from gft_lite.objective.reduction import Part, Reduction
from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Row
from gft_lite.recipe.method_parameters import bind_method
from gft_lite.recipe.schema import Recipe
from gft_lite.types import SOURCES

# What has a gradient, and is computed for every token of the step before any backward pass.
_WITH_GRADIENT = ("logprobs", "entropy", "reference_kl")
_ROWS_AT_ONCE = 4  # In fp64, the logits of large vocabularies take gigabytes.


@dataclass(frozen=True)
class PlainStep:
    """Loss and gradient of a step; `size` is the sum of the absolute parts of the loss."""

    loss: float
    size: float
    gradient: Tensor


def plain_step(
    policy: Policy, recipe: Recipe, rows: Sequence[Row], progress: float, dtype: torch.dtype
) -> PlainStep:
    """The step on all rows, in the given precision."""
    model = copy.deepcopy(policy.model).to(dtype)
    parameters = [p for n, p in model.named_parameters() if n in policy.parameters()]
    refers = {"reference_logprobs", "reference_kl"} & set(find_method(recipe.method).needs)
    with_reference = bool(refers or recipe.objective.kl)
    chunks = [rows[i : i + _ROWS_AT_ONCE] for i in range(0, len(rows), _ROWS_AT_ONCE)]
    with torch.no_grad():
        found = [_scores(model, chunk, with_reference) for chunk in chunks]
    scores = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    names = [name for name in _WITH_GRADIENT if name in scores]
    leaves = [scores[name].requires_grad_() for name in names]
    shares = _shares_of_loss(recipe, rows, scores, progress)
    slopes = torch.autograd.grad(shares.sum(), leaves, allow_unused=True, materialize_grads=True)
    tokens = [sum(len(row.response_ids) for row in chunk) for chunk in chunks]
    for chunk, *part in zip(chunks, *(slope.split(tokens) for slope in slopes), strict=True):
        own = _scores(model, chunk, with_reference)
        torch.cat([s * own[name] for name, s in zip(names, part, strict=True)]).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    gradient = torch.cat([grad.flatten() for grad in grads]).double()
    return PlainStep(shares.sum().item(), shares.abs().sum().item(), gradient)


def _shares_of_loss(
    recipe: Recipe, rows: Sequence[Row], scores: dict[str, Tensor], progress: float
) -> Tensor:
    """What each token of each part of the loss adds to the step's loss, one after another."""
    method, objective = find_method(recipe.method), recipe.objective
    optional: dict[str, Any] = {
        name: _loss_input(name, rows, scores, progress) for name in method.needs
    }
    advantages = _joined([[row.advantage] * len(row.response_ids) for row in rows], scores)
    inputs = LossInputs(scores["logprobs"], advantages, **optional)
    loss = call_with_parameters(method.loss, inputs, parameters=bind_method(recipe)).per_token
    loss = loss * _importance(recipe, rows, scores)
    parts = list(zip(method.parts, loss, strict=True)) if method.parts else [(Part(), loss)]
    if objective.kl:
        estimate = k3(scores["logprobs"], scores["reference_logprobs"])
        parts.append((Part(), objective.kl * estimate))
    if objective.entropy:
        parts.append((Part(reduction="token_mean"), -objective.entropy * scores["entropy"]))
    return torch.cat(
        [
            _reduced(values, rows, part, part.reduction or objective.reduction, recipe)
            for part, values in parts
        ]
    )


def _importance(recipe: Recipe, rows: Sequence[Row], scores: dict[str, Tensor]) -> Tensor:
    """The weight [T] of each token in the correction for the engine; 1 where none sampled it."""
    settings, own = recipe.objective.importance, scores["logprobs"].detach()
    if settings.mode == "none":
        return torch.ones_like(own)
    if settings.mode == "sequence_mask":  # Decided at the start of the step.
        weights = [row.loss_inputs.get("importance", 1.0) for row in rows]
        return _joined(
            [[w] * len(r.response_ids) for w, r in zip(weights, rows, strict=True)], scores
        )
    engine = _loss_input("engine_logprobs", rows, scores, 0.0)
    if not isinstance(engine, Tensor):
        return torch.ones_like(own)
    old = _loss_input("old_logprobs", rows, scores, 0.0)
    sampled = _joined([_sampled(row) for row in rows], scores)
    ratio = ((own if old is None else old) - engine).exp()
    if settings.mode == "token_truncate":
        limited = ratio.clamp(max=settings.cap)
    else:
        limited = ratio * ((ratio >= settings.low) & (ratio <= settings.high))
    return limited.where(sampled > 0, 1.0)


def _sampled(row: Row) -> Tensor:
    """1 for the tokens [R] that an engine sampled, else 0."""
    values = torch.as_tensor(row.loss_inputs.get("engine_logprobs", torch.nan))
    return values.isfinite().float().expand(len(row.response_ids))


def _reduced(
    values: Tensor, rows: Sequence[Row], part: Part, reduction: Reduction, recipe: Recipe
) -> Tensor:
    """The values of a part's own tokens, divided as the stated reduction says."""
    inside = [SOURCES[source] in part.sources for row in rows for source in _sources(row)]
    counts = torch.tensor(inside).split([len(row.response_ids) for row in rows])
    of_rows = [
        row[mask] for row, mask in zip(values.split([*map(len, counts)]), counts, strict=True)
    ]
    of_rows = [row for row in of_rows if len(row)]
    if not of_rows:
        return values[:0]
    if reduction == "token_mean":
        return torch.cat(of_rows) / sum(map(len, of_rows))
    if reduction == "sequence_mean":
        return torch.cat([row / len(row) for row in of_rows]) / len(of_rows)
    return torch.cat(of_rows) / (len(of_rows) * recipe.rollout.max_tokens)


def _loss_input(
    name: str, rows: Sequence[Row], scores: dict[str, Tensor], progress: float
) -> Tensor | float | None:
    """An optional input of the loss: computed here, or a value that the rows have."""
    if name == "progress":
        return progress
    if name == "source":
        return torch.tensor([source for row in rows for source in _sources(row)])
    if name in scores:
        return scores[name] if name == "reference_kl" else scores[name].detach()
    values = [row.loss_inputs.get(name) for row in rows]
    if all(value is None for value in values):
        return None
    own = scores["logprobs"].detach()
    found = _joined(
        [
            torch.as_tensor(torch.nan if value is None else value).expand(len(row.response_ids))
            for value, row in zip(values, rows, strict=True)
        ],
        scores,
    )
    # The engine's log-probs are the trainer's own where no engine sampled.
    return found.where(found.isfinite(), own) if name == "engine_logprobs" else found


def _joined(values: Sequence[Any], scores: dict[str, Tensor]) -> Tensor:
    """Values of every row's tokens [R] as one [T] in the precision of the scores."""
    dtype = scores["logprobs"].dtype
    return torch.cat([torch.as_tensor(each).to(dtype) for each in values])


def _sources(row: Row) -> list[int]:
    """The source of each response token: the prefix of a row is an expert's."""
    rest = len(row.response_ids) - row.prefix
    return [SOURCES.index("expert")] * row.prefix + [row.source] * rest


def _scores(model: Any, rows: Sequence[Row], with_reference: bool) -> dict[str, Tensor]:
    """Log-probs and entropies of the rows' responses, and the reference's; each [T]."""
    logp = _distributions(model, rows)
    pick = torch.tensor([token for row in rows for token in row.response_ids])[:, None]
    own = {"logprobs": logp.gather(-1, pick)[:, 0], "entropy": -(logp.exp() * logp).sum(-1)}
    if not with_reference:
        return own
    with torch.no_grad(), model.disable_adapter():
        reference = _distributions(model, rows)
    return {
        **own,
        "reference_logprobs": reference.gather(-1, pick)[:, 0],
        "reference_kl": (reference.exp() * (reference - logp)).sum(-1),
    }


def _distributions(model: Any, rows: Sequence[Row]) -> Tensor:
    """Log-probs [T, V] at each token of the responses.

    What follows a row in its line does not change a causal model's logits before it.
    """
    lines = [torch.tensor(row.prompt_ids + row.response_ids) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.cat(
        [
            of_row[len(row.prompt_ids) - 1 : len(row) - 1].log_softmax(-1)
            for of_row, row in zip(logits, rows, strict=True)
        ]
    )
