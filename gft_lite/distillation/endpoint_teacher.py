"""TODO: gft_lite/distillation/endpoint_teacher.py"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gft_lite.distillation.teachers import (
    Events,
    Keep,
    Say,
    TeacherError,
    TeacherRequest,
    TeacherResponse,
    TeacherSettings,
    prompt_text,
)
from gft_lite.recipe.schema import Recipe
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.openai_client import Endpoint, EndpointError, key_from
from gft_lite.utils.secrets import find_secret

KEY = "GFT_LITE_TEACHER_KEY"
# Nobody else is to be shown the key of an account at OpenAI.
OPENAI, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
MOST_FAILURES = 8  # So many in a row, or one for each request in flight, and asking has no sense.
# Parameters that some endpoints refuse, and under which name they may take them.
_INSTEAD = {"seed": None, "max_tokens": "max_completion_tokens"}
_UNFINISHED = ("length", "content_filter", "tool_calls", "function_call")


# --- endpoints -------------------------------------------------------------------------------


class EndpointTeacher:
    """A model behind the chat route of an OpenAI-compatible server; its key is in the
    environment."""

    def __init__(self, url: str, recipe: Recipe, asking: TeacherSettings, say: Say) -> None:
        """Find the model. Raises: RecipeError for an address, key or model that won't do."""
        self._asking, self._say = asking, say
        self._prompt = prompt_text(recipe, asking, "chat")
        self._refused: set[str] = set()
        self._max_tokens = asking.max_tokens or recipe.rollout.max_tokens
        with closing(_endpoint(url, retries=1)) as impatient:
            self.name = _find_model(impatient, asking.model)
        self._endpoint = _endpoint(url)

    def start(self, scratch: Path, stack: ExitStack) -> str:
        """There is nothing to start."""
        stack.callback(self._endpoint.close)
        return self.name

    def prompt(self, problem: Problem) -> Sequence[Any]:
        """The system's and the user's turn."""
        system = self._prompt.system
        first = [] if system is None else [{"role": "system", "content": system}]
        text = self._prompt.template.replace("{problem}", problem.text)
        return [*first, {"role": "user", "content": text}]

    def answers(self, questions: Sequence[TeacherRequest], keep: Keep, proven: bool) -> Events:
        """Ask with `concurrency` requests in flight.

        Raises: RecipeError if the first are refused, TeacherError if too many fail in a row.
        """
        pace = Pace(self._asking.requests_per_minute)
        most = self._asking.concurrency
        todo = iter(questions)
        answered, failures = False, 0
        running: dict[Future[TeacherResponse | EndpointError], TeacherRequest] = {}
        # When we are interrupted, its end waits for what is in flight, and that is kept.
        with ThreadPoolExecutor(most) as pool:
            while True:
                for question in islice(todo, most - len(running)):
                    pace.wait()
                    running[pool.submit(self._answer, question, keep)] = question
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                events = [(running.pop(future), future.result()) for future in done]
                for _, said in events:
                    if isinstance(said, TeacherResponse):
                        answered, failures = True, 0
                    elif said.status in (401, 403, 404) and not answered:
                        raise _unusable(said)
                    # What is wrong with one question need not be with all.
                    elif said.passing or not (answered or proven):
                        failures += 1
                yield [
                    (q, said if isinstance(said, TeacherResponse) else str(said))
                    for q, said in events
                ]
                if failures >= max(MOST_FAILURES, most):
                    reason = f"failed {failures} times in a row: {events[-1][1]}"
                    raise TeacherError(f"teacher: must answer, but {reason}")

    def _answer(self, question: TeacherRequest, keep: Keep) -> TeacherResponse | EndpointError:
        try:
            answer = _read(self._ask(question))
        except EndpointError as error:
            return error
        keep(question, answer)
        return answer

    def _ask(self, question: TeacherRequest) -> Any:
        """The endpoint's answer; a parameter that it refuses by name is not sent again."""
        while True:
            refused = set(self._refused)
            body = self._body(question, refused)
            try:
                return self._endpoint.post("chat/completions", body)
            except EndpointError as error:
                said = str(error) if error.status in (400, 422) else ""
                names = {name for name, other in _INSTEAD.items() if (other or name) in said}
                if not names - refused:
                    raise
                if names - self._refused:
                    self._refused |= names
                    self._say(f"the endpoint takes no {' and no '.join(sorted(names))}: {said}")

    def _body(self, question: TeacherRequest, refused: set[str]) -> dict[str, Any]:
        asking = self._asking
        body = {
            "model": self.name,
            "messages": question.prompt,
            "temperature": asking.temperature,
            # Some take no more than 31 bits.
            "seed": question.seed % 2**31,
            "max_tokens": self._max_tokens,
        }
        if asking.top_p < 1:
            body["top_p"] = asking.top_p
        for name in refused:
            value = body.pop(name)
            if other := _INSTEAD[name]:
                body[other] = value
        return body


def _find_model(endpoint: Endpoint, asked: str | None) -> str:
    """The model that was asked for, or the only one there is."""
    try:
        offered = list(endpoint.models())
    except EndpointError as error:
        # Not every endpoint lists its models.
        if asked is None or error.status in (None, 401, 403):
            raise _unusable(error) from error
        return asked
    if asked is None and len(offered) != 1:
        names = ", ".join(offered[:20]) or "none"
        raise RecipeError([f"model: must name one of the endpoint's models, which are {names}."])
    return asked or offered[0]


def _endpoint(url: str, **options: int) -> Endpoint:
    """The server at an address. Raises: RecipeError for one that would give a key away."""
    if find_secret(url):
        rule = "must not hold a token or a password, got one"
        raise RecipeError([f"teacher: {rule}. Put it into the environment as {KEY}."])
    try:
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    if not host:
        raise RecipeError([f"teacher: must be an address such as http://host:8000, got {url!r}."])
    endpoint = Endpoint(url, key_from(KEY, *([OPENAI_KEY] if host == OPENAI else [])), **options)
    if endpoint.exposes_key:
        rule = f"must be https, or on this machine, to be sent the key in {KEY}"
        raise RecipeError([f"teacher: {rule}, got {url!r}. Unset {KEY} if it needs none."])
    return endpoint


def _unusable(error: EndpointError) -> RecipeError:
    advice = f" (its key belongs into {KEY})" if error.status in (401, 403) else ""
    return RecipeError([f"teacher: must answer, but {error}{advice}"])


def _read(answer: Any) -> TeacherResponse:
    """An answer of the chat route. Raises: EndpointError for what is none."""
    try:
        [choice, *_] = answer["choices"]
        text = choice["message"].get("content") or ""
        unfinished = choice.get("finish_reason") in _UNFINISHED
        usage = answer.get("usage") or {}
        tokens = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EndpointError(f"answered no chat completion: {answer!r:.200}", 200) from error
    # A half of a surrogate pair can be neither tokenised nor written.
    text = str(text).encode(errors="replace").decode()
    return TeacherResponse(text, "length" if unfinished else "stop", *tokens)


class Pace:
    """Requests at even intervals, `per_minute` of them, or none to wait for."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    def wait(self) -> None:
        """Return when it is time for the next request."""
        now = time.monotonic()
        time.sleep(max(0.0, self._next - now))
        self._next = max(now, self._next) + self._interval
