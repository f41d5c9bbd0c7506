"""OpenAI-compatible servers, ours and other people's: the one place that talks HTTP to them."""

from __future__ import annotations

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

from gft_lite.utils.secrets import redact

LISTING = 30.0  # Seconds that a server may take to list its models.
LONGEST_REASON = 500  # Characters of a server's own words that an error repeats.


class EndpointError(RuntimeError):
    """A server that was not reached, or that refused.

    `status` is its HTTP status, None without an answer; `passing` says that the same request
    may do later, or elsewhere.
    """

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.passing = status is None or status in (408, 429) or status >= 500


class Endpoint:
    """One server. May be used by several threads at once.

    A request is repeated when the connection breaks and after statuses 408, 409, 429 and 5xx,
    as soon as Retry-After says, else after 0.5, 1, 2, 4, 8, 8, ... seconds.
    """

    def __init__(
        self, url: str, key: str | None = None, *, timeout: float = 600.0, retries: int = 5
    ) -> None:
        """`url` is the base of its routes, `/v1` where it names none; `timeout` is in seconds."""
        import openai

        self.url = url.rstrip("/") + ("" if urlsplit(url).path.strip("/") else "/v1")
        self.root = self.url.removesuffix("/v1")
        self._key = key
        self._client = openai.OpenAI(
            base_url=self.url,
            # An empty one would be replaced by that of the user's OpenAI account.
            api_key=key or "none",
            timeout=openai.Timeout(timeout, connect=min(timeout, 10.0)),
            max_retries=retries,
            # A proxy can't reach our own loopback address, and has no business with the key.
            http_client=openai.DefaultHttpxClient(trust_env=not self.on_this_machine),
        )

    @property
    def on_this_machine(self) -> bool:
        """Whether the address is a loopback address."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def exposes_key(self) -> bool:
        """Whether others could read the key on its way to the server."""
        plain = urlsplit(self.url).scheme != "https"
        return self._key is not None and plain and not self.on_this_machine

    def get(self, path: str, **patience: float) -> Any:
        """The answer, parsed if it is JSON; `path` is relative to the base, or a whole address.

        `patience` may have a `timeout` and `max_retries` for this request alone.
        Raises: EndpointError.
        """
        return self._ask("get", path, options=patience)

    def post(self, path: str, body: object = None, **patience: float) -> Any:
        """The answer to a JSON body, parsed if it is JSON. Raises: EndpointError."""
        return self._ask("post", path, options=patience, body=body)

    def models(self) -> dict[str, dict[str, Any]]:
        """What the server offers by name, adapters included. Raises: EndpointError."""
        answer = self.get("models", timeout=LISTING)
        try:
            return {str(model["id"]): model for model in answer["data"]}
        except (KeyError, TypeError) as error:
            rule = "must be an OpenAI-compatible server"
            raise EndpointError(f"{self.url}: {rule}, but lists no models.", 200) from error

    def close(self) -> None:
        """Close the connections; may be called twice."""
        self._client.close()

    def _ask(self, method: str, path: str, **request: Any) -> Any:
        import openai

        try:
            return getattr(self._client, method)(path, cast_to=object, **request)
        except openai.APIStatusError as error:
            reason = f"answered {error.status_code}: {_words(error)}"
            raise EndpointError(self._hidden(f"{self.url}: {reason}"), error.status_code) from None
        except openai.OpenAIError as error:
            reason = f"gave no answer: {error.__cause__ or error}"
            raise EndpointError(self._hidden(f"{self.url}: {reason}")) from None
        except ValueError as error:
            raise EndpointError(f"{self.url}: answered with broken JSON: {error}") from None

    def _hidden(self, text: str) -> str:
        """The text without the key, which some servers repeat when they refuse it."""
        return redact(text.replace(self._key, "***") if self._key else text)


def key_from(*names: str) -> str | None:
    """The first of these environment variables that is set: keys are kept nowhere else."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _words(error: Any) -> str:
    """What the server says about a refusal, cut to a bearable length."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    text = str(said or error.response.text).strip()
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."
