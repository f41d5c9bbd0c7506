"""The loss of a step's tokens: the method's, its correction for the engine, KL and entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gft_lite.objective.importance import Importance
from gft_lite.objective.losses import LossInputs, LossOutput, k3
from gft_lite.objective.method import call_with_parameters
from gft_lite.objective.methods import METHODS, find_method
from gft_lite.policy.base import Policy, TokenScores
from gft_lite.policy.batching import SELF, MicroBatch
from gft_lite.recipe.method_parameters import bind_method
from gft_lite.recipe.schema import Recipe
from gft_lite.rollout.registry import ENGINES, find_engine
from gft_lite.utils.errors import UserError
from gft_lite.utils.user_code import user_errors_as

# Inputs of a loss that come with the rows of a micro-batch.
OF_ROWS = (
    "old_logprobs", "engine_logprobs", "teacher_logprobs", "correct", "success_share",
    "row_entropy", "entropy_quantile",
)  # fmt: skip


class StepLoss:
    """The whole loss of a slice's tokens, without the rows' weights.

    That is the method's, weighted by importance, with the recipe's KL penalty and entropy bonus as
    further parts.
    """

    def __init__(self, policy: Policy, recipe: Recipe) -> None:
        self.policy, self.recipe = policy, recipe
        self.method = find_method(recipe.method)
        self.parameters = bind_method(recipe)
        self.importance = choose_importance(recipe)

    def __call__(
        self,
        batch: MicroBatch,
        scores: TokenScores,
        span: slice = slice(None),
        *,
        reference: Tensor | None = None,
        progress: float = 0.0,
    ) -> LossOutput:
        """Shapes: per_token [T], or [P, T] for P parts; metrics [T]."""
        objective = self.recipe.objective
        output = self._loss(self._loss_inputs(batch, scores, span, reference, progress))
        weights = self._importance_weights(batch, scores, span)
        terms = [output.per_token if weights is None else output.per_token * weights]
        if objective.kl and reference is not None:
            terms.append(objective.kl * k3(scores.logprobs, reference[span]))
        if objective.entropy:
            terms.append(-objective.entropy * scores.entropy)
        if len(terms) == 1:
            return replace(output, per_token=terms[0])
        return replace(output, per_token=torch.cat([t.view(-1, t.shape[-1]) for t in terms]))

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Tensor | None:
        """The reference's log-probs [T] of a micro-batch; None where the loss reads none."""
        if not (self.recipe.objective.kl or "reference_logprobs" in self.method.needs):
            return None
        with self.policy.reference():
            return self.policy.token_scores(batch).logprobs

    def _importance_weights(
        self, batch: MicroBatch, scores: TokenScores, span: slice
    ) -> Tensor | None:
        """The weights of the correction for the sampling engine [T]; None without one."""
        if self.importance.mode == "none":
            return None
        if self.importance.mode == "sequence_mask":
            sampled = batch.source[span] == SELF  # Without a prefix, a demonstration's.
            return batch.loss_inputs["importance"][span].where(sampled, 1.0)
        gaps = engine_gaps(batch, scores, span)
        return None if gaps is None else self.importance.weights(gaps)

    def _loss(self, inputs: LossInputs) -> LossOutput:
        """The method's loss. Raises: UserError for a user's own loss that fails."""
        name = self.recipe.method
        if name in METHODS:
            return self._call_loss(inputs)
        with user_errors_as(lambda text: UserError([f"method: the loss of {name} failed: {text}"])):
            output = self._call_loss(inputs)
            shapes = [output.per_token.shape, *(m.shape for m in output.metrics.values())]
        tokens = inputs.logprobs.shape
        parts = [(len(self.method.parts), *tokens) if self.method.parts else tokens]
        if shapes != parts + [tokens] * len(output.metrics):
            raise UserError(
                [f"method: the loss of {name} must give a value per token for per_token and each "
                 f"metric, {list(inputs.logprobs.shape)}, got {[list(s) for s in shapes]}."]
            )  # fmt: skip
        return output

    def _call_loss(self, inputs: LossInputs) -> LossOutput:
        return call_with_parameters(self.method.loss, inputs, parameters=self.parameters)

    def _loss_inputs(
        self,
        batch: MicroBatch,
        scores: TokenScores,
        span: slice,
        reference: Tensor | None,
        progress: float,
    ) -> LossInputs:
        """The inputs that the method needs, for a slice of a micro-batch's tokens."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[span]

        optional: dict[str, Any] = {
            "source": cut(batch.source),
            "entropy": scores.entropy.detach(),
            "reference_logprobs": cut(reference),
            "reference_kl": scores.reference_kl,
            "progress": progress,
            **{name: cut(batch.loss_inputs.get(name)) for name in OF_ROWS},
        }
        engine = optional["engine_logprobs"]
        if engine is not None:  # NaN where no engine sampled the token.
            own = scores.logprobs.detach()
            optional["engine_logprobs"] = engine.where(engine.isfinite(), own)
        needed = {name: optional[name] for name in self.method.needs}
        return LossInputs(scores.logprobs, batch.advantages[span], **needed)


def choose_importance(recipe: Recipe) -> Importance:
    """The correction for the sampling engine, with `auto` decided."""
    settings, method = recipe.objective.importance, find_method(recipe.method)
    mode = settings.mode
    if mode == "auto":
        compares = "self" in method.sources and "old_logprobs" in method.needs
        own = find_engine(recipe.rollout.engine) is ENGINES["transformers"]
        mode = "token_truncate" if compares and not own else "none"
    return Importance(mode, settings.cap, settings.low, settings.high)


def engine_gaps(batch: MicroBatch, scores: TokenScores, span: slice = slice(None)) -> Tensor | None:
    """Trainer - engine log-probs [T] at the rollout; NaN where no engine sampled the token."""
    engine = batch.loss_inputs.get("engine_logprobs")
    if engine is None:
        return None
    old = batch.loss_inputs.get("old_logprobs")
    return (scores.logprobs.detach() if old is None else old[span]) - engine[span]
