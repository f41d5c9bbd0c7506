"""The model whose log-probs on the policy's own samples a method learns from (`teacher:`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gft_lite.data.base import Unusable
from gft_lite.data.prompts import PromptFormat
from gft_lite.policy.adapter_config import CONFIG, lora_settings, read_adapter_config
from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.lora_section import LoraSettings
from gft_lite.recipe.schema import Recipe
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError, short_repr


class TeacherModel:
    """Scores responses as the recipe's `teacher.model`.

    `sees_demonstration`: it scores them after a prompt that shows an expert's demonstration.
    Raises: RecipeError for a model or adapter that does not fit the policy.
    """

    def __init__(
        self, policy: Policy, recipe: Recipe, format: PromptFormat, *, sees_demonstration: bool
    ) -> None:
        self.policy, self.settings = policy, recipe.teacher
        self.format, self.sees_demonstration = format, sees_demonstration
        self._longest = policy.context - recipe.rollout.max_tokens - 1
        self._prompts: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._adapter: dict[str, Tensor] | None = None  # Weights in place of the policy's.
        self._other: Policy | None = None
        model = self.settings.model
        if model == "average":
            self._adapter = self._copy()
        elif (Path(model) / CONFIG).is_file():
            self._adapter = self._read_adapter(Path(model))
        elif model != "base":
            self._other = self._load_other(recipe, model)

    # --- prompts -------------------------------------------------------------------------------

    def usable(self, problems: Sequence[Problem]) -> tuple[Problem, ...]:
        """The problems whose prompt for the teacher leaves room for a response in the context.

        Raises: RecipeError if there is none.
        """
        kept = []
        for problem in problems:
            try:
                ids = self._prompt_ids(problem)
            except Unusable:
                continue
            if len(ids) <= self._longest:
                self._prompts[problem.prompt_ids] = ids
                kept.append(problem)
        if not kept:
            raise RecipeError(
                [f"teacher.template: must leave room for rollout.max_tokens in the model's context "
                 f"of {self.policy.context} tokens, got none of {len(problems)} problems that do."]
            )  # fmt: skip
        return tuple(kept)

    def _prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        if not self.sees_demonstration:
            return problem.prompt_ids
        parts = {"{problem}": problem.text, "{demonstration}": problem.experts[0]}
        # In one pass: a problem may hold the name of the other.
        text = re.sub("|".join(parts), lambda found: parts[found[0]], self.settings.template)
        return self.format.problem_ids(replace(problem, text=text))

    # --- scores --------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, rows: Sequence[Row], token_budget: int) -> list[Row]:
        """The rows with the teacher's log-probs [R] in nats as `teacher_logprobs`."""
        shown = [
            Row(self._prompts.get(row.prompt_ids, row.prompt_ids), row.response_ids) for row in rows
        ]
        found: dict[int, Tensor] = {}
        with self._teaching() as model:
            for batch in model.batches(shown, token_budget):
                found |= batch.by_row(model.token_scores(batch).logprobs.cpu())
        return [
            replace(row, loss_inputs={**row.loss_inputs, "teacher_logprobs": found[i]})
            for i, row in enumerate(rows)
        ]

    @contextmanager
    def _teaching(self) -> Iterator[Policy]:
        """The teacher as a policy in eval mode, for the length of a `with`."""
        model = self._other or self.policy
        with evaluating(model):
            if self._adapter is None:
                with model.base():
                    yield model
                return
            own = {name: p.data for name, p in model.parameters().items()}
            self._set(self._adapter)
            try:
                yield model
            finally:
                self._set(own)

    # --- weights -------------------------------------------------------------------------------

    def follow(self) -> None:
        """Move an `average` towards the policy, after an update of it."""
        if self.settings.model == "average" and self._adapter is not None:
            for name, parameter in self.policy.parameters().items():
                self._adapter[name].lerp_(parameter.data, 1 - self.settings.decay)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must keep: the weights of an `average`."""
        return (self._adapter or {}) if self.settings.model == "average" else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue with what `state` was."""
        for name, value in self.state.items():
            value.copy_(state[name])

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.policy.parameters().items()}

    def _set(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.policy.parameters().items():
            parameter.data = weights[name]

    def _read_adapter(self, folder: Path) -> dict[str, Tensor]:
        lora = self.policy.settings.lora.trained
        theirs = lora_settings(read_adapter_config(folder))
        if (theirs.rank, theirs.alpha) != (lora.rank, lora.alpha):
            raise RecipeError(
                [f"teacher.model: must have the rank and alpha of policy.lora, {lora.rank} and "
                 f"{lora.alpha}, got {str(folder)!r} with {theirs.rank} and {theirs.alpha}. Merge "
                 "it, and name the merged model."]
            )  # fmt: skip
        own = self._copy()
        try:
            self.policy.load_adapter(folder)
            return self._copy()
        finally:
            with torch.no_grad():
                for name, parameter in self.policy.parameters().items():
                    parameter.copy_(own[name])

    def _load_other(self, recipe: Recipe, model: str) -> Policy:
        settings = recipe.policy.model_copy(
            update={"model": model, "revision": None, "adapter": None, "reference": "base",
                    "lora": LoraSettings(rank=1)}
        )  # fmt: skip
        try:
            other = load_policy(settings, recipe.seed)
        except RecipeError as error:
            found = [text.replace("policy.model", "teacher.model") for text in error.problems]
            raise RecipeError(found) from error
        if other.tokenizer.get_vocab() != self.policy.tokenizer.get_vocab():
            raise RecipeError(
                [f"teacher.model: must have the tokenizer of policy.model, {recipe.policy.model}, "
                 f"to score its tokens, got {short_repr(model)} with another vocabulary."]
            )  # fmt: skip
        return other
