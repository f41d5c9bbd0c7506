"""Scored groups to the rows of an update, their tokens weighted in each part of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gft_lite.objective.method import Method, call_with_parameters
from gft_lite.objective.methods import find_method
from gft_lite.objective.reduction import Part, token_weights
from gft_lite.policy.batching import EXPERT, Row
from gft_lite.recipe.method_parameters import bind_method
from gft_lite.recipe.schema import Recipe
from gft_lite.types import SOURCES, Response, ScoredGroup


def make_rows(recipe: Recipe, groups: Sequence[ScoredGroup]) -> list[Row]:
    """The rows that one update trains on, weighted by the reduction of each part of the loss."""
    method, parameters = find_method(recipe.method), bind_method(recipe)
    mask = recipe.objective.mask_truncated
    rows = [
        _row(method, scored, response, advantage)
        for scored in groups
        for (response, advantage), selected in zip(
            scored, _select(method, parameters, scored), strict=True
        )
        if selected and response.token_ids and not (mask and response.truncated)
    ]
    return _weighted(recipe, rows)


def loss_parts(recipe: Recipe) -> tuple[Part, ...]:
    """The parts of the loss: the method's own, a KL penalty and an entropy bonus."""
    own = find_method(recipe.method).parts or (Part(),)
    penalty = (Part(),) if recipe.objective.kl else ()
    bonus = (Part(reduction="token_mean"),) if recipe.objective.entropy else ()
    return own + penalty + bonus


def _select(method: Method, parameters: Mapping[str, Any], scored: ScoredGroup) -> Sequence[bool]:
    """Whether each response of a group is trained on."""
    if method.select is None:
        return [True] * len(scored.group)
    chosen: Sequence[bool] = call_with_parameters(method.select, scored, parameters=parameters)
    return chosen


def _row(method: Method, scored: ScoredGroup, response: Response, advantage: float) -> Row:
    """A response as a row, with the loss's inputs that are known before any pass."""
    inputs: dict[str, Any] = {
        "correct": float(scored.is_right(response)),
        "success_share": scored.success_share,
    }
    if response.logprobs is not None:
        start = response.prefix
        inputs["engine_logprobs"] = [math.nan] * start + list(response.logprobs[start:])
    return Row(
        scored.group.problem.prompt_ids,
        response.token_ids,
        advantage,
        source=SOURCES.index(response.source),
        prefix=response.prefix,
        loss_inputs={
            name: value
            for name, value in inputs.items()
            if name in method.needs or name == "engine_logprobs"
        },
    )


def _weighted(recipe: Recipe, rows: Sequence[Row]) -> list[Row]:
    """The rows with the weights of their tokens, those of a prefix and the others."""
    pairs = [_part_weights(recipe, part, rows) for part in loss_parts(recipe)]
    if len(pairs) == 1:
        weights, prefix_weights = pairs[0]
        return [
            replace(row, weight=weight, prefix_weight=before)
            for row, weight, before in zip(rows, weights, prefix_weights, strict=True)
        ]
    columns = (zip(*each, strict=True) for each in zip(*pairs, strict=True))
    return [
        replace(row, weight=weight, prefix_weight=before)
        for row, weight, before in zip(rows, *columns, strict=True)
    ]


def _part_weights(
    recipe: Recipe, part: Part, rows: Sequence[Row]
) -> tuple[list[float], list[float]]:
    """Each row's weight in a part of the loss, and that of the tokens of its prefix."""
    sources = {SOURCES.index(source) for source in part.sources}
    prefix = EXPERT in sources
    inside = [row.source in sources for row in rows]
    lengths = [
        row.prefix * prefix + (len(row.response_ids) - row.prefix) * counts
        for row, counts in zip(rows, inside, strict=True)
    ]
    reduction = part.reduction or recipe.objective.reduction
    weights = token_weights(lengths, reduction, recipe.rollout.max_tokens)
    own = [weight * counts for weight, counts in zip(weights, inside, strict=True)]
    return own, [weight * prefix for weight in weights]
