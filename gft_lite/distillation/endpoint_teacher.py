"""Teacher back end for OpenAI-compatible servers."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gft_lite.distillation.teachers import (
    Log,
    OnResponse,
    Results,
    TeacherError,
    TeacherRequest,
    TeacherResponse,
    TeacherSettings,
    prompt_settings,
    token_count,
)
from gft_lite.recipe.schema import Recipe
from gft_lite.types import Problem
from gft_lite.utils.errors import UserError, short_repr
from gft_lite.utils.openai_client import Endpoint, EndpointError, check_address, key_from
from gft_lite.utils.secrets import find_secret

KEY = "GFT_LITE_TEACHER_KEY"
# The key of an OpenAI account is sent to OpenAI only.
OPENAI, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
MAX_BYTES = 4 << 20  # Of a chat completion: about a million tokens.
# Consecutive failures after which the distillation stops; at least one per request in flight.
MAX_FAILURES = 8
# Parameters that some endpoints reject, and the name under which they may accept the value.
_ALTERNATIVES = {"seed": None, "max_tokens": "max_completion_tokens"}
_INCOMPLETE = ("length", "content_filter", "tool_calls", "function_call")


class EndpointTeacher:
    """A model behind the chat route of an OpenAI-compatible server; its key is read from the
    environment."""

    def __init__(self, url: str, recipe: Recipe, settings: TeacherSettings, log: Log) -> None:
        """Find the model. Raises: UserError for an unusable address, key or model."""
        self._settings, self._log = settings, log
        self._prompt = prompt_settings(recipe, settings, "chat")
        self._rejected: set[str] = set()
        self._max_tokens = settings.max_tokens or recipe.rollout.max_tokens
        with closing(open_endpoint(url, retries=1)) as endpoint:
            self.name = _find_model(endpoint, settings.model)
        self._endpoint = open_endpoint(url, timeout=settings.timeout)

    def start(self, scratch: Path, stack: ExitStack) -> str:
        """Load nothing; the identity of the teacher is the model's name."""
        stack.callback(self._endpoint.close)
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
        failures = Failures(has_answered, max(MAX_FAILURES, concurrency))
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
        try:
            response = parse_completion(self._post(request))
        except EndpointError as error:
            return error
        on_response(request, response)
        return response

    def _post(self, request: TeacherRequest) -> Any:
        """Send a request; a parameter that the server rejects by name is not sent again."""
        while True:
            rejected = set(self._rejected)
            try:
                return self._endpoint.post("chat/completions", self._body(request, rejected))
            except EndpointError as error:
                text = str(error) if error.status in (400, 422) else ""
                names = {name for name, other in _ALTERNATIVES.items() if (other or name) in text}
                if not names - rejected:
                    raise
                if names - self._rejected:
                    self._rejected |= names
                    listed = " and ".join(sorted(names))
                    self._log(f"the endpoint rejects {listed}, which is no longer sent: {text}")

    def _body(self, request: TeacherRequest, rejected: set[str]) -> dict[str, Any]:
        settings = self._settings
        body = {
            "model": self.name,
            "messages": request.prompt,
            "temperature": settings.temperature,
            # Some servers accept at most 31 bits.
            "seed": request.seed % 2**31,
            "max_tokens": self._max_tokens,
        }
        if settings.top_p < 1:
            body["top_p"] = settings.top_p
        for name in rejected:
            value = body.pop(name)
            if alternative := _ALTERNATIVES[name]:
                body[alternative] = value
        return body


class Failures:
    """Consecutive failed requests, to stop when no further request can be expected to succeed."""

    def __init__(self, has_answered: bool, limit: int) -> None:
        self._stored, self._limit = has_answered, limit
        self._answered, self._consecutive = False, 0
        self._last = ""

    def count(self, outcome: TeacherResponse | EndpointError) -> None:
        """Count an outcome. Raises: UserError if the server rejects the key, model or route."""
        if isinstance(outcome, TeacherResponse):
            self._answered, self._consecutive = True, 0
            return
        if outcome.status in (401, 403, 404) and not self._answered:
            raise _unusable(outcome)
        # The rejection of one request says nothing about the others once one was answered.
        if outcome.transient or not (self._answered or self._stored):
            self._consecutive += 1
            self._last = str(outcome)

    def check(self) -> None:
        """Raises: TeacherError after too many consecutive failures."""
        if self._consecutive >= self._limit:
            reason = f"failed {self._consecutive} times in a row: {self._last}"
            raise TeacherError(f"teacher: must answer, but {reason}")


class RateLimiter:
    """Spaces requests evenly, at most `per_minute` of them; None is no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    def wait(self) -> None:
        """Return when the next request may be sent."""
        now = time.monotonic()
        time.sleep(max(0.0, self._next - now))
        self._next = max(now, self._next) + self._interval


def open_endpoint(url: str, **options: Any) -> Endpoint:
    """A client for the server at `url`, with the key from the environment.

    Raises: UserError for an address that is invalid or would expose the key.
    """
    if find_secret(url) or "@" in url:
        rule = "must not hold a token or a password, got one"
        raise UserError([f"teacher: {rule}. Set the environment variable {KEY} instead."])
    try:
        check_address(url)
    except ValueError as error:
        raise UserError([f"teacher: {error}, got {short_repr(url)}."]) from error
    is_openai = urlsplit(url).hostname == OPENAI
    key = key_from(KEY, *([OPENAI_KEY] if is_openai else []))
    endpoint = Endpoint(url, key, max_bytes=MAX_BYTES, **options)
    if endpoint.exposes_key:
        rule = f"must be https, or on this machine, to be sent the key in {KEY}"
        raise UserError([f"teacher: {rule}, got {short_repr(url)}. Unset {KEY} if it needs none."])
    return endpoint


def _find_model(endpoint: Endpoint, model: str | None) -> str:
    """The requested model, or the only one of the server. Raises: UserError."""
    try:
        names = list(endpoint.models())
    except EndpointError as error:
        # Not every endpoint lists its models.
        if model is None or error.status in (None, 401, 403):
            raise _unusable(error) from error
        return model
    if model is None and len(names) != 1:
        listed = ", ".join(map(short_repr, names[:20])) or "none"
        raise UserError([f"model: must name one of the endpoint's models, which are {listed}."])
    return model or names[0]


def _unusable(error: EndpointError) -> UserError:
    advice = f" (set its key in {KEY})" if error.status in (401, 403) else ""
    return UserError([f"teacher: must answer, but {error}{advice}"])


def parse_completion(body: Any) -> TeacherResponse:
    """Read the body of the chat route. Raises: EndpointError for anything but a completion."""
    try:
        choice = body["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
        usage = body.get("usage")
        prompt, completion = _count(usage, "prompt"), _count(usage, "completion")
        if not isinstance(text, str | None) or not isinstance(reason, str | None):
            raise TypeError("content and finish_reason must be strings")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise EndpointError("answered without a valid chat completion", 200) from error
    # A lone surrogate can be neither tokenized nor written.
    text = (text or "").encode(errors="replace").decode()
    return TeacherResponse(text, "length" if reason in _INCOMPLETE else "stop", prompt, completion)


def _count(usage: Mapping[str, Any] | None, kind: str) -> int:
    """The number of tokens, 0 where the server gives none. Raises: ValueError, AttributeError."""
    count = None if usage is None else usage.get(f"{kind}_tokens")
    return 0 if count is None else token_count(count)
