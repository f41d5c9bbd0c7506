"""TODO: gft_lite/distillation/local_teacher.py"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from gft_lite.data.prompts import PromptFormat
from gft_lite.distillation.teachers import (
    Events,
    Keep,
    TeacherRequest,
    TeacherResponse,
    TeacherSettings,
    prompt_text,
)
from gft_lite.evaluation.targets import base_identity, find_targets, identity
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.rollout.base import Request, Sampling
from gft_lite.rollout.registry import find_engine, start_engine
from gft_lite.rollout.sync_check import sync
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError

# --- models on this machine ------------------------------------------------------------------


class LocalTeacher:
    """A model that the recipe's rollout engine serves."""

    def __init__(self, teacher: str, recipe: Recipe, asking: TeacherSettings) -> None:
        """Find the model. Raises: RecipeError for a target that isn't there."""
        # What the policy's model needs to load is not asked of another one.
        how = {"quantization", "double_quantization", "dtype", "device", "threads", "attention"}
        settings = recipe.policy.model_dump(include=how, exclude_unset=True)
        settings["trust_remote_code"] = False  # Not even that of a run that trusted it.
        targets = find_targets([teacher], PolicySettings.model_validate(settings))
        if len(targets) > 1:
            raise RecipeError([f"teacher: must be one model, got {len(targets)} at {teacher!r}."])
        find_engine(recipe.rollout.engine)
        self._recipe, self._asking, [self._target] = recipe, asking, targets
        self.name = self._target.label

    def start(self, scratch: Path, stack: ExitStack) -> str:
        """Load the model and start the engine."""
        import torch

        target, recipe = self._target, self._recipe
        if target.policy.threads:
            torch.set_num_threads(target.policy.threads)
        policy = load_policy(target.policy, recipe.seed)
        style = "chat" if policy.tokenizer.chat_template else "plain"
        self._format = PromptFormat(
            policy.tokenizer, prompt_text(recipe, self._asking, style), "teacher"
        )
        policy.eos_ids |= set(self._format.stop_ids)
        self._context = policy.context
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        self._engine = start_engine(recipe.rollout, policy, scratch)
        stack.callback(self._engine.close)
        who = identity(base_identity(policy), target.adapter)
        if target.adapter is not None:
            sync(self._engine, policy, scratch / "adapters", 1)
        # Engines draw differently from the same seed, as may the base they serve.
        return f"{who}/{self._engine.name}/{recipe.rollout.base}/{policy.context}"

    def prompt(self, problem: Problem) -> Sequence[Any]:
        """The token ids of the prompt, by the model's own chat template if it has one."""
        return self._format.prompt_ids(problem.text)

    def answers(self, questions: Sequence[TeacherRequest], keep: Keep, proven: bool) -> Events:
        """Ask in batches large enough to keep the engine busy."""
        asking, rollout = self._asking, self._recipe.rollout
        most = asking.max_tokens or rollout.max_tokens
        sampling = Sampling(asking.temperature, asking.top_p, max_tokens=most)
        fitting = [q for q in questions if len(q.prompt) < self._context]
        if len(fitting) < len(questions):
            reason = f"the prompt fills the teacher's context of {self._context} tokens"
            yield [(q, reason) for q in questions if len(q.prompt) >= self._context]
        todo = iter(fitting)
        while batch := list(islice(todo, 4 * rollout.rows)):
            requests = [Request(tuple(q.prompt), (q.seed,)) for q in batch]
            events: list[tuple[TeacherRequest, TeacherResponse | str]] = []
            for question, [c] in zip(batch, self._engine.generate(requests, sampling), strict=True):
                text = self._format.text(c.token_ids)
                answer = TeacherResponse(
                    text, c.finish_reason, len(question.prompt), len(c.token_ids)
                )
                keep(question, answer)
                events.append((question, answer))
            yield events
