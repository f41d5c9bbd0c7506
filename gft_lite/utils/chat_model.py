"""A model behind the chat route of an OpenAI-compatible server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from gft_lite.utils.errors import UserError, short_repr
from gft_lite.utils.openai_client import Endpoint, EndpointError, check_address, key_from
from gft_lite.utils.secrets import find_secret

# The key of an OpenAI account is sent to OpenAI only.
OPENAI, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
MAX_BYTES = 4 << 20  # Of a chat completion: about a million tokens.
MAX_TOKEN_COUNT = 10**9  # Of one response; sums of larger counts overflow floats.
# Parameters that some endpoints reject, and the name under which they may accept the value.
_ALTERNATIVES = {"seed": None, "max_tokens": "max_completion_tokens"}
_INCOMPLETE = ("length", "content_filter", "tool_calls", "function_call")
_FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ChatResponse:
    """A model's response; `finish_reason` is "length" for every incomplete one."""

    text: str
    finish_reason: _FinishReason
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> ChatResponse:
        """Read a stored response. Raises: KeyError, TypeError or ValueError for anything else."""
        reason = entry["finish_reason"]
        if not isinstance(entry["text"], str) or reason not in get_args(_FinishReason):
            raise TypeError("text must be a string, finish_reason stop or length")
        counts = (token_count(entry[f"{kind}_tokens"]) for kind in ("prompt", "completion"))
        return cls(entry["text"], reason, *counts)


@dataclass(frozen=True, slots=True)
class ChatPlace:
    """Where a model is: the field of its address in errors, the address, the variable with its key,
    and the field of its name."""

    field: str
    url: str
    key: str
    model_field: str = "model"

    def connect(self, **options: Any) -> Endpoint:
        """A client for the server, with the key from the environment.

        Raises: UserError for an address that is invalid or would expose the key.
        """
        field, url, variable = self.field, self.url, self.key
        if find_secret(url) or "@" in url:
            rule = "must not hold a token or a password, got one"
            raise UserError([f"{field}: {rule}. Set the environment variable {variable} instead."])
        try:
            check_address(url)
        except ValueError as error:
            raise UserError([f"{field}: {error}, got {short_repr(url)}."]) from error
        is_openai = urlsplit(url).hostname == OPENAI
        key = key_from(variable, *([OPENAI_KEY] if is_openai else []))
        endpoint = Endpoint(url, key, max_bytes=MAX_BYTES, **options)
        if endpoint.exposes_key:
            rule = f"must be https, or on this machine, to be sent the key in {variable}"
            advice = f"Unset {variable} if it needs none."
            raise UserError([f"{field}: {rule}, got {short_repr(url)}. {advice}"])
        return endpoint

    def unusable(self, error: EndpointError) -> UserError:
        """The error for a server that rejects the key, model or route, or that is not there."""
        advice = f" (set its key in {self.key})" if error.status in (401, 403) else ""
        return UserError([f"{self.field}: must answer, but {error}{advice}"])


class ChatModel:
    """One model of a server; thread-safe. `timeout` limits a request in total, in seconds."""

    def __init__(
        self, place: ChatPlace, model: str | None, timeout: float, log: Callable[[str], None]
    ) -> None:
        """Find the model: the one of that name, or the only one of the server.

        Raises: UserError for an unusable address, key or model.
        """
        with closing(place.connect(retries=1)) as endpoint:
            self.name = _find_model(place, endpoint, model)
        self._endpoint = place.connect(timeout=timeout)
        self._rejected: set[str] = set()
        self._log = log

    def respond(
        self,
        messages: Sequence[Any],
        sampling: Mapping[str, Any],
        *,
        max_retries: int | None = None,
    ) -> ChatResponse:
        """Send a request; a parameter that the server rejects by name is not sent again.

        `sampling` are parameters of the route. Raises: EndpointError.
        """
        while True:
            rejected = set(self._rejected)
            body = {"model": self.name, "messages": messages, **sampling}
            for name in rejected & body.keys():
                value = body.pop(name)
                if alternative := _ALTERNATIVES[name]:
                    body[alternative] = value
            try:
                answered = self._endpoint.post("chat/completions", body, max_retries=max_retries)
            except EndpointError as error:
                text = str(error) if error.status in (400, 422) else ""
                names = {name for name, other in _ALTERNATIVES.items() if (other or name) in text}
                if not names - rejected:
                    raise
                if names - self._rejected:
                    self._rejected |= names
                    listed = " and ".join(sorted(names))
                    self._log(f"the endpoint rejects {listed}, which is no longer sent: {text}")
            else:
                return parse_completion(answered)

    def close(self) -> None:
        """Close the connections; requests in flight fail."""
        self._endpoint.close()


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


def price_of(
    prompt_tokens: int, completion_tokens: int, price_in: float | None, price_out: float | None
) -> float | None:
    """The price of tokens, of which a million have the prices given; None without any price."""
    if price_in is None and price_out is None:
        return None
    return (prompt_tokens * (price_in or 0) + completion_tokens * (price_out or 0)) / 1e6


def parse_completion(body: Any) -> ChatResponse:
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
    return ChatResponse(text, "length" if reason in _INCOMPLETE else "stop", prompt, completion)


def token_count(value: Any) -> int:
    """A number of tokens as JSON has it. Raises: ValueError for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_TOKEN_COUNT or value != int(value):
        raise ValueError("a token count must be a whole number from 0 to 10^9")
    return int(value)


def _count(usage: Mapping[str, Any] | None, kind: str) -> int:
    """The number of tokens, 0 where the server gives none. Raises: ValueError, AttributeError."""
    count = None if usage is None else usage.get(f"{kind}_tokens")
    return 0 if count is None else token_count(count)


def _find_model(place: ChatPlace, endpoint: Endpoint, model: str | None) -> str:
    """The requested model, or the only one of the server. Raises: UserError."""
    try:
        names = list(endpoint.models())
    except EndpointError as error:
        # Not every endpoint lists its models.
        if model is None or error.status in (None, 401, 403):
            raise place.unusable(error) from error
        return model
    if model is None and len(names) != 1:
        listed = ", ".join(map(short_repr, names[:20])) or "none"
        rule = "must name one of the endpoint's models, which are"
        raise UserError([f"{place.model_field}: {rule} {listed}."])
    return model or names[0]
