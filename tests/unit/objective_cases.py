"""Inputs for the losses of all methods, and their per-token values with the parts put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gft_lite.objective.losses import LossInputs, LossOutput
from gft_lite.objective.methods import METHODS
from gft_lite.objective.reduction import Part
from gft_lite.recipe.method_parameters import bind_method
from gft_lite.recipe.schema import Recipe
from gft_lite.types import SOURCES

F64 = torch.float64
INPUTS = {field.name for field in fields(LossInputs)}


def f64(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def close(result: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=result.dtype)
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


def output(loss: Callable[..., LossOutput], logprobs: Tensor, advantages: Tensor,
           **given: Any) -> LossOutput:  # fmt: skip
    """A loss with its optional inputs and its parameters given together."""
    inputs = {name: v for name, v in given.items() if name in INPUTS}
    parameters = {name: v for name, v in given.items() if name not in INPUTS}
    return loss(LossInputs(logprobs, advantages, **inputs), **parameters)


def value(loss: Callable[..., LossOutput], logprobs: Tensor, advantages: Tensor,
          **given: Any) -> Tensor:  # fmt: skip
    """The per-token loss."""
    return output(loss, logprobs, advantages, **given).per_token


def scored(rows: int = 3, tokens: int = 4, vocabulary: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, T, V] with gradient, the targets' log-probs [B, T], and their one-hots."""
    logits = (2 * torch.randn(rows, tokens, vocabulary, dtype=F64)).requires_grad_()
    targets = torch.randint(vocabulary, (rows, tokens))
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return logits, logprobs, torch.nn.functional.one_hot(targets, vocabulary).to(F64)


def parts_of(name: str) -> tuple[Part, ...]:
    return METHODS[name].parts or (Part(),)


def inputs_of(name: str, logprobs: Tensor) -> dict[str, Any]:
    """Every optional input of a loss at these tokens, off policy, with tokens of all its sources.

    Of these inputs no loss is flat: every token of a prefix counts, every response is right.
    """
    own = logprobs.detach()
    found = {SOURCES.index(source) for part in parts_of(name) for source in part.sources}
    source = torch.tensor(sorted(found)).repeat(own.numel())[: own.numel()].view(own.shape)
    return {
        "source": source,
        "old_logprobs": own - 0.1,
        "engine_logprobs": own + 0.05,
        "entropy": own.abs(),
        "row_entropy": own.new_full(own.shape, 0.4),
        "entropy_quantile": own.new_full(own.shape, 0.95),
        "reference_logprobs": own - 0.2,
        # A KL would depend on more than the target's log-prob; any function of it does here.
        "reference_kl": logprobs.square(),
        "teacher_logprobs": own + 0.3,
        "correct": own.new_ones(own.shape),
        "success_share": own.new_full(own.shape, 0.5),
        "progress": 0.3,
    }


def in_part(part: Part, source: Tensor) -> Tensor:
    """Whether each token belongs to a part of a loss."""
    return torch.stack([source == SOURCES.index(s) for s in part.sources]).any(0)


def together(name: str, per_token: Tensor, source: Tensor) -> Tensor:
    """The loss of each token, summed over the parts of the loss that it belongs to."""
    if not METHODS[name].parts:
        return per_token
    terms = zip(per_token, METHODS[name].parts, strict=True)
    return sum(
        (term * in_part(part, source) for term, part in terms), torch.zeros(()).to(per_token)
    )


def token_loss(name: str, logprobs: Tensor, advantages: Tensor, **given: Any) -> Tensor:
    """A method's per-token loss under the recipe's default parameters, off policy."""
    known = inputs_of(name, logprobs) | {n: v for n, v in given.items() if n in INPUTS}
    needed = {need: known[need] for need in METHODS[name].needs}
    loss, parameters = METHODS[name].loss, loss_parameters(name)
    chosen = parameters | {n: v for n, v in given.items() if n not in INPUTS}
    per_token = value(loss, logprobs, advantages, **needed, **chosen)
    return together(name, per_token, known["source"])


def recipe_of(name: str, **sections: Any) -> Recipe:
    """A recipe with this method, and a teacher for a method that has to have another model."""
    teacher = {"teacher": {"model": "another"}} if name == "opd" else {}
    return Recipe.from_tree({"method": name, **teacher, **sections})


@cache
def loss_parameters(name: str) -> dict[str, Any]:
    """The keyword arguments of a method's loss by default."""
    recipe = recipe_of(name)
    own = inspect.signature(METHODS[name].loss).parameters
    return {n: v for n, v in bind_method(recipe).items() if n in own}
