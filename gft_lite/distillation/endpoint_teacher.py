"""Teacher back end for OpenAI-compatible servers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from gft_lite.distillation.teachers import (
    Log,
    OnResponse,
    Results,
    TeacherError,
    TeacherRequest,
    TeacherResponse,
    TeacherSettings,
    prompt_settings,
)
from gft_lite.recipe.schema import Recipe
from gft_lite.types import Problem
from gft_lite.utils.chat_model import ChatModel, ChatPlace, RateLimiter
from gft_lite.utils.openai_client import EndpointError

KEY = "GFT_LITE_TEACHER_KEY"
# Consecutive failures after which the distillation stops; at least one per request in flight.
MAX_FAILURES = 8


class EndpointTeacher:
    """A model behind the chat route of an OpenAI-compatible server; its key is read from the
    environment."""

    def __init__(self, url: str, recipe: Recipe, settings: TeacherSettings, log: Log) -> None:
        """Find the model. Raises: UserError for an unusable address, key or model."""
        self._settings, self._place = settings, ChatPlace("teacher", url, KEY)
        self._prompt = prompt_settings(recipe, settings, "chat")
        self._max_tokens = settings.max_tokens or recipe.rollout.max_tokens
        self._model = ChatModel(self._place, settings.model, settings.timeout, log)
        self.name = self._model.name

    def start(self, scratch: Path, stack: ExitStack) -> str:
        """Load nothing; the identity of the teacher is the model's name."""
        stack.callback(self._model.close)
        return self.name

    def prompt(self, problem: Problem) -> Sequence[Any]:
        """The messages of the problem, after the system message if there is one."""
        system, template = self._prompt.system, self._prompt.template
        own = [] if system is None or problem.system else [{"role": "system", "content": system}]
        return own + [
            {**m, "content": template.replace("{problem}", m["content"])}
            if m["role"] == "user"
            else m
            for m in problem.messages
        ]

    def generate(
        self, requests: Sequence[TeacherRequest], on_response: OnResponse, has_answered: bool
    ) -> Generator[Results, None, None]:
        """Yield results as they arrive, with `concurrency` requests in flight.

        Raises: UserError if the server rejects the first requests, TeacherError after too many
        consecutive failures.
        """
        limiter = RateLimiter(self._settings.requests_per_minute)
        concurrency = self._settings.concurrency
        remaining = iter(requests)
        failures = Failures(self._place, has_answered, max(MAX_FAILURES, concurrency))
        running: dict[Future[TeacherResponse | EndpointError], TeacherRequest] = {}
        # After an interrupt, leaving the pool waits for the requests in flight: they are stored.
        with ThreadPoolExecutor(concurrency) as pool:
            while True:
                for request in islice(remaining, concurrency - len(running)):
                    limiter.wait()
                    running[pool.submit(self._respond, request, on_response)] = request
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                outcomes = [(running.pop(future), future.result()) for future in done]
                for _, outcome in outcomes:
                    failures.count(outcome)
                yield [
                    (request, str(outcome) if isinstance(outcome, EndpointError) else outcome)
                    for request, outcome in outcomes
                ]
                failures.check()

    def _respond(
        self, request: TeacherRequest, on_response: OnResponse
    ) -> TeacherResponse | EndpointError:
        settings = self._settings
        sampling = {
            "temperature": settings.temperature,
            # Some servers accept at most 31 bits.
            "seed": request.seed % 2**31,
            "max_tokens": self._max_tokens,
        }
        if settings.top_p < 1:
            sampling["top_p"] = settings.top_p
        try:
            response = self._model.respond(request.prompt, sampling)
        except EndpointError as error:
            return error
        on_response(request, response)
        return response


class Failures:
    """Consecutive failed requests, to stop when no further request can be expected to succeed."""

    def __init__(self, place: ChatPlace, has_answered: bool, limit: int) -> None:
        self._place, self._stored, self._limit = place, has_answered, limit
        self._answered, self._consecutive = False, 0
        self._last = ""

    def count(self, outcome: TeacherResponse | EndpointError) -> None:
        """Count an outcome. Raises: UserError if the server rejects the key, model or route."""
        if isinstance(outcome, TeacherResponse):
            self._answered, self._consecutive = True, 0
            return
        if outcome.status in (401, 403, 404) and not self._answered:
            raise self._place.unusable(outcome)
        # The rejection of one request says nothing about the others once one was answered.
        if outcome.transient or not (self._answered or self._stored):
            self._consecutive += 1
            self._last = str(outcome)

    def check(self) -> None:
        """Raises: TeacherError after too many consecutive failures."""
        if self._consecutive >= self._limit:
            reason = f"failed {self._consecutive} times in a row: {self._last}"
            raise TeacherError(f"teacher: must answer, but {reason}")
