"""HTTP client for OpenAI-compatible servers, with limits on time, size and redirects."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from gft_lite.utils.errors import UserError
from gft_lite.utils.secrets import redact

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
LISTING = 30.0  # Seconds for the list of models.
CONNECT = 10.0  # Seconds for a connection.
MAX_BYTES = 32 << 20  # Of a response; the log-probs of 100,000 tokens are a third of it.
MAX_ERROR_BYTES = 64 << 10  # Read of the body of an error.
MAX_REASON = 500  # Characters of a server's own error text in our error.
MAX_REDIRECTS = 5
# Seconds between two attempts: the first pause, its maximum, that of a Retry-After.
BACKOFF, MAX_BACKOFF, MAX_RETRY_AFTER = 0.5, 8.0, 60.0


class EndpointError(RuntimeError):
    """A request that failed.

    `status` is the HTTP status, None without a response; `transient` is True if the same request
    may succeed later or at another server.
    """

    def __init__(
        self, text: str, status: int | None = None, *, transient: bool | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        if transient is None:
            transient = status is None or status in (408, 409, 429) or status >= 500
        self.transient = transient


class Endpoint:
    """One server; thread-safe.

    `url` is the base of the routes, `/v1` is added where it has no path. `timeout` limits a
    request in total, its retries and the pauses between them included, in seconds. A request is
    repeated after a connection error and after statuses 408, 409, 429 and 5xx, at the time of
    Retry-After or else after 0.5, 1, 2, 4, 8, 8, ... seconds. A redirect is followed only to the
    same scheme, host and port. Raises: ValueError for a URL that is not an HTTP address.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 600.0,
        retries: int = 5,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        import httpx

        check_address(url)
        self.url = url.rstrip("/") + ("" if urlsplit(url).path.strip("/") else "/v1")
        self.root = self.url.removesuffix("/v1")
        self._key = key
        self._timeout, self._retries, self._max_bytes = timeout, retries, max_bytes
        self._client = httpx.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=httpx.Timeout(None, connect=CONNECT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            # A proxy cannot reach our loopback address and must not get the key.
            trust_env=not self.is_loopback,
        )

    @property
    def is_loopback(self) -> bool:
        """True if the address is a loopback address."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def exposes_key(self) -> bool:
        """True if the key would travel unencrypted to another machine."""
        plain = urlsplit(self.url).scheme != "https"
        return self._key is not None and plain and not self.is_loopback

    def get(
        self, path: str, *, timeout: float | None = None, max_retries: int | None = None
    ) -> Any:
        """Return the body of the response, parsed if it is JSON; `path` may be a whole URL.

        `timeout` and `max_retries` replace those of the endpoint. Raises: EndpointError.
        """
        return self._request("GET", path, None, timeout, max_retries)

    def post(
        self,
        path: str,
        body: object = None,
        *,
        timeout: float | None = None,
        max_retries: int | None = None,
    ) -> Any:
        """Send a JSON body; otherwise as `get`."""
        return self._request("POST", path, body, timeout, max_retries)

    def models(self) -> dict[str, dict[str, Any]]:
        """Return the server's models by name, adapters included. Raises: EndpointError."""
        response = self.get("models", timeout=LISTING)
        cards = response.get("data") if isinstance(response, dict) else None
        if not isinstance(cards, list) or not all(map(_is_model_card, cards)):
            rule = "must be an OpenAI-compatible server"
            raise EndpointError(f"{self.url}: {rule}, but lists no models.", 200)
        return {card["id"]: card for card in cards}

    def close(self) -> None:
        """Close the connections; requests in flight fail. A second call does nothing."""
        _run(self._client.aclose())

    def _request(
        self, method: str, path: str, body: object, timeout: float | None, retries: int | None
    ) -> Any:
        limit = self._timeout if timeout is None else timeout
        url = path if path.startswith(self.root) else f"{self.url}/{path}"
        content = None if body is None else json.dumps(body).encode()
        sending = self._send(
            self._client.build_request(
                method, url, content=content, headers={"Content-Type": "application/json"}
            ),
            self._retries if retries is None else retries,
        )
        try:
            response, data = _run(_within(limit, sending))
            return _parse(response, data)
        except TimeoutError:
            raise EndpointError(f"{self.url}: gave no answer within {limit:g} s") from None
        except CancelledError:
            raise EndpointError(f"{self.url}: the connection was closed") from None
        except EndpointError as error:
            text = self._without_key(f"{self.url}: {error}")
            raise EndpointError(text, error.status, transient=error.transient) from None

    async def _send(self, request: httpx.Request, retries: int) -> tuple[httpx.Response, bytes]:
        """Return a successful response with its body. Raises: EndpointError."""
        import httpx

        for attempt in range(retries + 1):
            pause = min(BACKOFF * 2**attempt, MAX_BACKOFF)
            try:
                response, data = await self._exchange(request)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                failure = EndpointError(f"gave no answer: {_root_cause(error)}")
            else:
                if response.is_success:
                    return response, data
                status = response.status_code
                failure = EndpointError(f"answered {status}: {_server_text(data)}", status)
                pause = _retry_after(response.headers) or pause
            if not failure.transient or self._client.is_closed:
                break
            if attempt < retries:
                await asyncio.sleep(pause)
        raise failure

    async def _exchange(self, request: httpx.Request) -> tuple[httpx.Response, bytes]:
        """Send one request, and follow redirects to the same server. Raises: EndpointError."""
        origin = _origin(request.url)
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._client.send(request, stream=True)
            try:
                if response.next_request is None:
                    return response, await self._read(response)
            finally:
                await response.aclose()
            request, status = response.next_request, response.status_code
            if (target := _origin(request.url)) != origin:
                reason = f"answered {status}: redirects to {target}, which is another server"
                raise EndpointError(reason, status, transient=False)
        raise EndpointError(f"answered {status}: redirects without end", status, transient=False)

    async def _read(self, response: httpx.Response) -> bytes:
        """The body, of errors only the beginning. Raises: EndpointError for one too large."""
        success, status = response.is_success, response.status_code
        # Decompression would undo the limit on size; the request asks for no compression.
        if success and response.headers.get("Content-Encoding", "identity") != "identity":
            raise EndpointError("answered with a compressed body", status, transient=True)
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if not success and len(data) > MAX_ERROR_BYTES:
                break
            if len(data) > self._max_bytes:
                limit = f"more than {self._max_bytes / (1 << 20):g} MiB"
                raise EndpointError(f"answered with {limit}", status, transient=True)
        return bytes(data)

    def _without_key(self, text: str) -> str:
        """The text with *** in place of the key, which some servers repeat in their errors."""
        return redact(text.replace(self._key, "***") if self._key else text)


def check_address(url: str) -> None:
    """Raises: ValueError, with the rule, for a URL that is not the address of an HTTP server."""
    import httpx

    rule = "must be an address such as http://host:8000"
    if not url.isprintable() or " " in url:
        raise ValueError(rule)
    try:
        parsed = httpx.URL(url)
        port = urlsplit(url).port  # Also rejects those that httpx accepts: 99999.
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(rule) from error
    if parsed.scheme not in ("http", "https") or not parsed.host or port == 0:
        raise ValueError(rule)
    if parsed.query or parsed.fragment or "?" in url or "#" in url:
        raise ValueError(f"{rule}, without a query or fragment")


def key_from(*names: str) -> str | None:
    """The value of the first of these environment variables that is set.

    Raises: UserError for one that an HTTP header cannot hold.
    """
    for name in names:
        if key := os.environ.get(name):
            if not (key.isascii() and key.isprintable()) or key != key.strip():
                rule = "must consist of printable ASCII characters without spaces around them"
                raise UserError([f"{name}: {rule}, got others. Set it to the key alone."])
            return key
    return None


@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all endpoints, in a thread of its own; one for each forked process.

    In asyncio, unlike in blocking code, a timeout limits every phase of a request.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="openai_client", daemon=True).start()
    return loop


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the event loop from any other thread."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _event_loop(os.getpid()))
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _within(seconds: float, coroutine: Coroutine[Any, Any, T]) -> T:
    async with asyncio.timeout(seconds):
        return await coroutine


def _parse(response: httpx.Response, data: bytes) -> Any:
    """The body as JSON if its content type says so, else as text. Raises: EndpointError."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if not kind.endswith("json"):
        return data.decode(errors="replace")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        text = f"answered with broken JSON: {_one_line(str(error))}"
        raise EndpointError(text, response.status_code, transient=True) from None


def _is_model_card(value: object) -> bool:
    name = value.get("id") if isinstance(value, dict) else None
    return isinstance(name, str) and name.isprintable()


def _origin(url: httpx.URL) -> str:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return f"{url.scheme}://{url.host}:{port}"


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds until the next attempt, if the server gives a usable number."""
    for name, unit in (("Retry-After-Ms", 1e-3), ("Retry-After", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 < seconds <= MAX_RETRY_AFTER:
            return seconds
    return None


def _root_cause(error: BaseException) -> str:
    """The text of the first cause, such as "Connection refused"."""
    while cause := (
        error.__cause__ or error.__context__ or getattr(error, "exceptions", [None])[0]
    ):
        error = cause
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    return _one_line(str(error)) or type(error).__name__


def _server_text(data: bytes) -> str:
    """The message in the body of an error."""
    text = data.decode(errors="replace")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return _one_line(text)
    if isinstance(body, dict):
        body = body.get("error", body)
    message = body.get("message") if isinstance(body, dict) else None
    return _one_line(message if isinstance(message, str) and message else text)


def _one_line(text: str) -> str:
    """Text from a server on one line of limited length, without control characters."""
    line = " ".join(text[: 2 * MAX_REASON].split())
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} ..."
