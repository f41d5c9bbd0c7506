"""Teacher back end for local models: a base, an adapter or a run, on the recipe's engine."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from gft_lite.data.base import Unusable
from gft_lite.distillation.teachers import (
    OnResponse,
    Results,
    TeacherRequest,
    TeacherResponse,
    TeacherSettings,
    prompt_settings,
)
from gft_lite.evaluation.targets import base_identity, find_targets, identity
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.rollout.base import Completion, Request, Sampling
from gft_lite.rollout.policy_engine import PolicyEngine
from gft_lite.rollout.registry import find_engine, start_engine
from gft_lite.rollout.sampling import graded_text, make_prompt_format, report_completions
from gft_lite.types import Problem
from gft_lite.utils.cpu import set_threads
from gft_lite.utils.errors import UserError

# The recipe's settings of the policy that apply to a teacher as well; the others, such as
# trust_remote_code, belong to the policy's model alone.
_SHARED_SETTINGS = {
    "quantization", "double_quantization", "dtype", "device", "threads", "attention"
}  # fmt: skip
_ROWS_PER_BATCH = 4  # Requests per batch, in units of rollout.rows, which keeps the engine busy.


class LocalTeacher:
    """A local model, served by the recipe's rollout engine."""

    def __init__(self, teacher: str, recipe: Recipe, settings: TeacherSettings) -> None:
        """Find the model. Raises: UserError for a target that does not exist."""
        shared = recipe.policy.model_dump(include=_SHARED_SETTINGS, exclude_unset=True)
        shared["trust_remote_code"] = False  # Overrides the recipe of a run that trusts it.
        targets = find_targets([teacher], PolicySettings.model_validate(shared))
        if len(targets) > 1:
            raise UserError([f"teacher: must be one model, got {len(targets)} at {teacher!r}."])
        find_engine(recipe.rollout.engine)
        self._recipe, self._settings, [self._target] = recipe, settings, targets
        self.name = self._target.label

    def start(self, scratch: Path, stack: ExitStack) -> str:
        """Load the model and start the engine; returns the identity of model and engine."""

        target, recipe = self._target, self._recipe
        set_threads(target.policy.threads)
        policy = load_policy(target.policy, recipe.seed)
        style = "chat" if policy.tokenizer.chat_template else "plain"
        prompt = prompt_settings(recipe, self._settings, style)
        self._format = make_prompt_format(policy, prompt, "teacher")
        self._context = policy.context
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        self._engine = start_engine(recipe.rollout, policy, scratch)
        stack.callback(self._engine.close)
        model = identity(base_identity(policy), target.adapter)
        if target.adapter is not None:
            PolicyEngine(self._engine, policy, scratch / "adapters").sync_unchecked(1)
        # Engines, and the bases that they serve, sample differently from equal seeds.
        stop = f"/{recipe.rollout.stop}" if recipe.rollout.stop else ""
        return f"{model}/{self._engine.name}/{recipe.rollout.base}/{policy.context}{stop}"

    def prompt(self, problem: Problem) -> Sequence[Any]:
        """The token ids of the prompt, by the model's chat template if it has one.

        Raises: UserError for a conversation that the model can't be given.
        """
        rule = "teacher: must be a model with a chat template"
        if self._format.chat is None and (problem.history or problem.system):
            raise UserError([f"{rule} for problems with earlier turns, got {self.name!r}."])
        try:
            return self._format.problem_ids(problem)
        except Unusable as reason:
            raise UserError(
                [f"{rule} that suits the problems, got {self.name!r}, for which problem "
                 f"{problem.id} has {reason}."]
            ) from None  # fmt: skip

    def generate(
        self, requests: Sequence[TeacherRequest], on_response: OnResponse, has_answered: bool
    ) -> Generator[Results, None, None]:
        """Yield a batch of results at a time; a prompt that fills the context is a failure."""
        settings, rollout = self._settings, self._recipe.rollout
        max_tokens = settings.max_tokens or rollout.max_tokens
        sampling = Sampling(
            settings.temperature, settings.top_p, max_tokens=max_tokens, stop=tuple(rollout.stop)
        )
        fitting = [r for r in requests if len(r.prompt) < self._context]
        if len(fitting) < len(requests):
            reason = f"the prompt fills the teacher's context of {self._context} tokens"
            yield [(r, reason) for r in requests if len(r.prompt) >= self._context]
        by_sample = {(tuple(r.prompt), r.seed): r for r in fitting}
        stored: dict[str, TeacherResponse] = {}
        report = report_completions(len(fitting))

        def store(prompt_ids: tuple[int, ...], seed: int, completion: Completion) -> None:
            """Store a response as soon as it is complete, so that an interrupt loses none."""
            request = by_sample[prompt_ids, seed]
            stored[request.key] = self._response(request, completion, sampling)
            on_response(request, stored[request.key])
            report(prompt_ids, seed, completion)

        remaining = iter(fitting)
        while batch := list(islice(remaining, _ROWS_PER_BATCH * rollout.rows)):
            jobs = [Request(tuple(r.prompt), (r.seed,)) for r in batch]
            completions = self._engine.generate(jobs, sampling, store)
            for request, [completion] in zip(batch, completions, strict=True):
                if request.key not in stored:  # A user's engine may report none.
                    store(tuple(request.prompt), request.seed, completion)
            yield [(request, stored.pop(request.key)) for request in batch]

    def _response(
        self, request: TeacherRequest, completion: Completion, sampling: Sampling
    ) -> TeacherResponse:
        text = graded_text(completion.token_ids, self._format, sampling.stop)
        text = self._format.opened_thoughts + text  # For policies with other prompts.
        counts = len(request.prompt), len(completion.token_ids)
        return TeacherResponse(text, completion.finish_reason, *counts)
