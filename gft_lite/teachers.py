"""Who answers `gft-lite distill`: an OpenAI-compatible endpoint, or a model on this machine."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from gft_lite.endpoint import Endpoint, EndpointError, key_from
from gft_lite.policy import load_policy
from gft_lite.prompts import PromptFormat
from gft_lite.recipe import PolicySettings, Prompt, Recipe, RecipeError, Settings, Share
from gft_lite.recipe_errors import explain
from gft_lite.rollout import Request, Sampling, find_engine, start_engine
from gft_lite.rollout.probe import sync
from gft_lite.secret import find_secret
from gft_lite.targets import base_identity, find_targets, identity
from gft_lite.types import FinishReason, Problem

KEY = "GFT_LITE_TEACHER_KEY"
# Nobody else is to be shown the key of an account at OpenAI.
OPENAI, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
MOST_FAILURES = 8  # So many in a row, or one for each request in flight, and asking has no sense.
# Parameters that some endpoints refuse, and under which name they may take them.
_INSTEAD = {"seed": None, "max_tokens": "max_completion_tokens"}
_UNFINISHED = ("length", "content_filter", "tool_calls", "function_call")


class Asking(Settings):
    """How a teacher is asked: `samples` answers to each problem, of the first `limit` problems.

    `max_tokens` and `system` are the recipe's where they are not given; prices are dollars per
    million tokens; `column` is the name of the new column.
    """

    model: str | None = None
    samples: PositiveInt = 3
    temperature: NonNegativeFloat = 0.7
    top_p: Share = 1.0
    max_tokens: PositiveInt | None = None
    system: str | None = None
    limit: PositiveInt | None = None
    concurrency: PositiveInt = 8
    requests_per_minute: PositiveFloat | None = None
    price_in: NonNegativeFloat | None = None
    price_out: NonNegativeFloat | None = None
    column: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = "teacher"

    @model_validator(mode="after")
    def _samples_differ(self) -> Asking:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples: must be 1 at temperature 0, where all are the same")
        return self

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Asking:
        """Check what the user gave. Raises: RecipeError with every error found."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(explain(error, cls, {})) from None


@dataclass(frozen=True, slots=True)
class Question:
    """One of the answers that a problem is to get; `prompt` is messages or token ids."""

    problem: Problem
    prompt: Sequence[Any]
    seed: int
    key: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a teacher said; `finish_reason` is "length" for all that is no whole answer."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


Keep = Callable[[Question, Answer], None]
Say = Callable[[str], None]
Events = Generator[list[tuple[Question, Answer | str]], None, None]


class TeacherError(RuntimeError):
    """The teacher went away while it was asked."""


class Teacher(Protocol):
    """Who can be asked; `name` is what the data set says of who answered."""

    name: str

    def start(self, scratch: Path, stack: ExitStack) -> str:
        """Make ready to answer; returns what tells this teacher's answers from all others'."""

    def prompt(self, problem: Problem) -> Sequence[Any]:
        """How a problem is put to this teacher, as JSON."""

    def answers(self, questions: Sequence[Question], keep: Keep, proven: bool) -> Events:
        """Ask; answers are kept as they come, then told, and so is why there is none.

        `proven` says that such a question has been answered before.
        """


def find_teacher(teacher: str, recipe: Recipe, asking: Asking, say: Say) -> Teacher:
    """The endpoint at an address, or the model on this machine.

    Raises: RecipeError for one that isn't there or doesn't let us in.
    """
    if re.match("https?://", teacher):
        return EndpointTeacher(teacher, recipe, asking, say)
    if asking.model is not None:
        raise RecipeError([f"model: must be left out for {teacher!r}, which is no address."])
    return LocalTeacher(teacher, recipe, asking)


# --- endpoints -------------------------------------------------------------------------------


class EndpointTeacher:
    """A model behind the chat route of an OpenAI-compatible server; its key is in the
    environment."""

    def __init__(self, url: str, recipe: Recipe, asking: Asking, say: Say) -> None:
        """Find the model. Raises: RecipeError for an address, key or model that won't do."""
        self._asking, self._say = asking, say
        self._prompt = _prompt(recipe, asking, "chat")
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

    def answers(self, questions: Sequence[Question], keep: Keep, proven: bool) -> Events:
        """Ask with `concurrency` requests in flight.

        Raises: RecipeError if the first are refused, TeacherError if too many fail in a row.
        """
        pace = Pace(self._asking.requests_per_minute)
        most = self._asking.concurrency
        todo = iter(questions)
        answered, failures = False, 0
        running: dict[Future[Answer | EndpointError], Question] = {}
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
                    if isinstance(said, Answer):
                        answered, failures = True, 0
                    elif said.status in (401, 403, 404) and not answered:
                        raise _unusable(said)
                    # What is wrong with one question need not be with all.
                    elif said.passing or not (answered or proven):
                        failures += 1
                yield [(q, said if isinstance(said, Answer) else str(said)) for q, said in events]
                if failures >= max(MOST_FAILURES, most):
                    reason = f"failed {failures} times in a row: {events[-1][1]}"
                    raise TeacherError(f"teacher: must answer, but {reason}")

    def _answer(self, question: Question, keep: Keep) -> Answer | EndpointError:
        try:
            answer = _read(self._ask(question))
        except EndpointError as error:
            return error
        keep(question, answer)
        return answer

    def _ask(self, question: Question) -> Any:
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

    def _body(self, question: Question, refused: set[str]) -> dict[str, Any]:
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


def _read(answer: Any) -> Answer:
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
    return Answer(text, "length" if unfinished else "stop", *tokens)


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


# --- models on this machine ------------------------------------------------------------------


class LocalTeacher:
    """A model that the recipe's rollout engine serves."""

    def __init__(self, teacher: str, recipe: Recipe, asking: Asking) -> None:
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
            policy.tokenizer, _prompt(recipe, self._asking, style), "teacher"
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

    def answers(self, questions: Sequence[Question], keep: Keep, proven: bool) -> Events:
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
            events: list[tuple[Question, Answer | str]] = []
            for question, [c] in zip(batch, self._engine.generate(requests, sampling), strict=True):
                text = self._format.text(c.token_ids)
                answer = Answer(text, c.finish_reason, len(question.prompt), len(c.token_ids))
                keep(question, answer)
                events.append((question, answer))
            yield events


def _prompt(recipe: Recipe, asking: Asking, style: str) -> Prompt:
    """The recipe's prompt in the teacher's style."""
    own = recipe.data.prompt
    # An empty one is none.
    system = (own.system if asking.system is None else asking.system) or None
    if style == "plain" and system is not None:
        raise RecipeError(["system: must be empty for a teacher without a chat template."])
    return Prompt.model_validate({"style": style, "template": own.template, "system": system})
