"""A teacher that sends anything: each bad response is a counted failure, and requests end."""

from __future__ import annotations

import itertools
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from waiting import wait_until

from gft_lite.cli import main
from gft_lite.distillation.teachers import TeacherResponse
from gft_lite.utils import openai_client
from gft_lite.utils.chat_model import parse_completion
from gft_lite.utils.openai_client import Endpoint, EndpointError

LARGEST = 64 << 20  # Bytes that the server sends before it gives up.
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class RawServer:
    """Sends the bytes that `reply(head, body)` yields; `requests` has the heads, `sent` counts."""

    def __init__(self, reply: Callable[[bytes, bytes], Iterable[bytes]]) -> None:
        self.requests: list[bytes] = []
        self.sent = 0
        server = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                head = b"".join(iter(lambda: self.rfile.readline().strip(b"\n"), b"\r"))
                sizes = [
                    line for line in head.split(b"\r") if line.lower().startswith(b"content-l")
                ]
                body = self.rfile.read(int(sizes[0].split(b":")[1])) if sizes else b""
                server.requests.append(head)
                try:
                    for piece in reply(head, body):
                        self.wfile.write(piece)
                        server.sent += len(piece)
                except OSError:
                    pass  # The client has closed the connection.

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = allow_reuse_address = True

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def post(server: RawServer, *, timeout: float = 60, max_bytes: int = 1 << 20) -> object:
    endpoint = Endpoint(server.url, "k" * 20, timeout=timeout, retries=0, max_bytes=max_bytes)
    try:
        return endpoint.post("chat/completions", {"messages": ["the problem"]})
    finally:
        endpoint.close()


def whole(status: bytes, data: bytes, *headers: bytes) -> Iterator[bytes]:
    """A complete response that closes the connection."""
    lines = [b"HTTP/1.1 " + status, b"Connection: close", b"Content-Length: %d" % len(data)]
    yield b"\r\n".join([*lines, *headers, b"", data])


JSON_TYPE = b"Content-Type: application/json"


# --- size and time ---------------------------------------------------------------------------


@pytest.mark.parametrize("head", [b"\r\n", b"Content-Length: 99999999999\r\n\r\n",
                                  b"Transfer-Encoding: chunked\r\n\r\n"])  # fmt: skip
def test_a_body_without_end_is_cut_off(head):
    chunk = b"10000\r\n" + b"[" * (1 << 16) + b"\r\n" if b"chunked" in head else b" " * (1 << 16)

    def reply(*_: bytes) -> Iterator[bytes]:
        yield OK + head
        yield from itertools.repeat(chunk, LARGEST >> 16)

    with RawServer(reply) as server:
        with pytest.raises(EndpointError, match="answered with more than 1 MiB") as caught:
            post(server)
        assert caught.value.transient
        assert server.sent < LARGEST // 2


def test_an_error_with_a_body_without_end_has_its_status():
    def reply(*_: bytes) -> Iterator[bytes]:
        yield b"HTTP/1.1 418 teapot\r\n\r\n"
        yield from itertools.repeat(b"short and stout " * 4096, LARGEST >> 16)

    with RawServer(reply) as server:
        with pytest.raises(EndpointError, match="answered 418: short and stout") as caught:
            post(server)
        assert caught.value.status == 418 and len(str(caught.value)) < 700
        assert server.sent < LARGEST // 2


def test_a_compressed_body_is_not_expanded():
    with RawServer(lambda *_: whole(b"200 OK", b"x", b"Content-Encoding: gzip")) as server:
        with pytest.raises(EndpointError, match="answered with a compressed body"):
            post(server)
        assert b"accept-encoding: identity" in server.requests[0].lower()


@pytest.mark.parametrize(
    ("start", "piece"),
    [(OK + b"\r\n", b" "), (OK, b"X-A: b\r\n"), (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
     (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), (b"", b"")],
)  # fmt: skip
def test_a_slow_response_ends_at_the_time_limit(start, piece):
    """Each piece arrives soon after the last: no pause is as long as the limit."""

    def reply(*_: bytes) -> Iterator[bytes]:
        yield start
        for _ in range(150):
            time.sleep(0.02)
            yield piece
        yield b"HTTP/1.1 200 OK\r\n\r\n" if not start else b"\r\n"

    with RawServer(reply) as server:
        with pytest.raises(EndpointError, match=r"gave no answer within 0\.3 s") as caught:
            post(server, timeout=0.3)
        assert caught.value.status is None and caught.value.transient


def test_the_time_limit_includes_retries():
    reply = whole(b"503 busy", b"", b"Retry-After: 50")
    with RawServer(lambda *_: reply) as server:
        endpoint = Endpoint(server.url, timeout=1, retries=5)
        with pytest.raises(EndpointError, match=r"gave no answer within 1 s"):
            endpoint.get("models")
        wait_until(lambda: server.requests)  # Its thread may not have run yet.
        assert len(server.requests) == 1


# --- redirects -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.1:{other}/v1", "http://localhost:{own}/v1", "https://127.0.0.1:{own}/v1",
     "//127.0.0.1:{other}/v1", "http://127.0.0.1:{own}@127.0.0.1:{other}/v1",
     "ftp://127.0.0.1/x", "http://[::1]:{own}/v1", "http://127.0.0.1/v1"],
)  # fmt: skip
def test_a_redirect_to_another_server_is_not_followed(status, target):
    with RawServer(lambda *_: whole(b"200 OK", b"{}", JSON_TYPE)) as other:

        def reply(head: bytes, body: bytes) -> Iterator[bytes]:
            location = target.format(own=own.port, other=other.port)
            return whole(b"%d Moved" % status, b"", b"Location: " + location.encode())

        with RawServer(reply) as own:
            with pytest.raises(EndpointError) as caught:
                post(own)
            assert not other.requests and len(own.requests) == 1
        assert "the problem" not in str(caught.value)
        if "ftp" not in target:
            assert (caught.value.status, caught.value.transient) == (status, False)
            assert "which is another server" in str(caught.value)


def test_a_redirect_on_the_same_server_is_followed_with_the_body():
    def reply(head: bytes, body: bytes) -> Iterator[bytes]:
        if b"/v1/" in head:
            return whole(b"307 Moved", b"", b"Location: /v2/chat")
        return whole(b"200 OK", body, JSON_TYPE)

    with RawServer(reply) as server:
        assert post(server) == {"messages": ["the problem"]}
        assert [head.split()[1] for head in server.requests] == [
            b"/v1/chat/completions",
            b"/v2/chat",
        ]


def test_redirects_in_a_circle_end():
    with RawServer(lambda *_: whole(b"308 Moved", b"", b"Location: /x")) as server:
        with pytest.raises(EndpointError, match="answered 308: redirects without end"):
            post(server)
        assert len(server.requests) == 6


def test_cookies_are_not_kept():
    reply = (b"200 OK", b"{}", JSON_TYPE, b"Set-Cookie: session=1; Path=/")
    with RawServer(lambda *_: whole(*reply)) as server:
        endpoint = Endpoint(server.url)
        for _ in range(2):
            endpoint.get("models")
        endpoint.close()
        assert len(server.requests) == 2
        assert not any(b"cookie" in head.lower() for head in server.requests)


# --- the content of a completion -------------------------------------------------------------


def completion(content: object = "#1", reason: object = "stop", **usage: object) -> dict:
    return {"choices": [{"message": {"content": content}, "finish_reason": reason}],
            "usage": usage or None}  # fmt: skip


BAD_NUMBERS = ["1e999", "-1", "NaN", "1.5", '"7"', "true", "[]", "{}", "1" * 400, "1000000001"]
BROKEN = [
    b"", b"null", b"[]", b"7", b'"choices"', b"{}", b'{"choices": {}}', b'{"choices": [[]]}',
    b'{"choices": [{"message": "x"}]}', b'{"choices": [{"message": {"content": 7}}]}',
    b'{"choices": [{"message": {"content": ["x"]}}]}',
    b'{"choices": [{"message": {}}], "usage": 1}',
    b'{"choices": [{"message": {"content": "x"}, "finish_reason": []}]}',
    b"{" * 20, b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'"\\ud8', b"1" * 5000, b"NaN",
    "\u00e9".encode("latin-1"),
    *(json.dumps(completion(prompt_tokens=1, completion_tokens=2)).replace("2", n).encode()
      for n in BAD_NUMBERS),
]  # fmt: skip


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_completion_is_an_endpoint_error(data):
    with (
        RawServer(lambda *_: whole(b"200 OK", data, JSON_TYPE)) as server,
        pytest.raises(EndpointError) as caught,
    ):
        parse_completion(post(server))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.fixture
def run_distill(tmp_path: Path, monkeypatch, capfd):
    """Run the command on 4 problems of the lab; returns exit code, errors and summary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(openai_client, "BACKOFF", 0.001)
    numbers = itertools.count()

    def run(server: RawServer, samples: int = 3) -> tuple[int, str, dict]:
        out = f"{next(numbers)}.jsonl"
        command = ["distill", "recipes/lab.yaml", "--teacher", server.url, "--model", "m",
                   "--limit", "4", "--samples", str(samples), "--out", out]  # fmt: skip
        code = main(command)
        summary = Path(out).with_suffix(".distill") / "summary.json"
        printed = capfd.readouterr()
        found = json.loads(summary.read_text()) if summary.exists() else {}
        return code, printed.out + printed.err, found

    return run


def teacher(bodies: Iterable[Iterable[bytes]]) -> Callable[[bytes, bytes], Iterable[bytes]]:
    """Lists one model, then sends each of the responses once, and good ones after them."""
    remaining, lock = iter(bodies), threading.Lock()
    good = json.dumps(completion(prompt_tokens=5, completion_tokens=7)).encode()

    def reply(head: bytes, body: bytes) -> Iterable[bytes]:
        if head.startswith(b"GET"):
            return whole(b"200 OK", b'{"data": [{"id": "m"}]}', JSON_TYPE)
        with lock:
            return next(remaining, None) or whole(b"200 OK", good, JSON_TYPE)

    return reply


def test_every_broken_completion_is_counted_and_the_others_are_kept(run_distill):
    """Also in the middle of a run: the endpoint has answered before and answers afterwards."""
    good = completion(prompt_tokens=5, completion_tokens=7)
    bodies = [json.dumps(good).encode()] * 4 + [
        b for pair in BROKEN for b in (pair, json.dumps(good).encode())
    ]
    with RawServer(teacher(whole(b"200 OK", body, JSON_TYPE) for body in bodies)) as server:
        code, printed, summary = run_distill(server, samples=20)
        assert code == 1 and "failed: " in printed and "Traceback" not in printed
        assert (summary["answered"], summary["failed"]) == (80 - len(BROKEN), len(BROKEN))
        assert summary["completion_tokens"] == 7 * (80 - len(BROKEN))


def test_the_problems_are_not_sent_to_the_target_of_a_redirect(run_distill):
    with RawServer(lambda *_: whole(b"200 OK", b"{}", JSON_TYPE)) as other:
        location = f"Location: {other.url}/v1/chat/completions".encode()
        moved = (list(whole(b"307 Moved", b"", location)) for _ in range(12))
        with RawServer(teacher(moved)) as server:
            code, printed, _ = run_distill(server)
        assert code == 1 and "which is another server" in printed
        assert not other.requests


# --- fuzzing ---------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([10**400, -(10**18), 2**63, float("inf"), float("nan"), "", "stop", "length"]),
)  # fmt: skip
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = ("choices", "message", "content", "finish_reason", "usage", "prompt_tokens",
         "completion_tokens", "error", "role", "tool_calls")  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn) -> object:
    """A valid completion in which random values replace some of its parts."""
    value = completion(draw(st.text(max_size=20)), "stop", prompt_tokens=3, completion_tokens=4)
    for _ in range(draw(st.integers(0, 3))):
        place: object = value
        for _ in range(draw(st.integers(0, 3))):
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            inner = place[draw(st.sampled_from(keys))]
            if not (isinstance(inner, dict | list) and inner):
                break
            place = inner
        if isinstance(place, dict):
            place[draw(st.sampled_from(NAMES))] = draw(ANY_JSON)
        elif place:
            place[draw(st.integers(0, len(place) - 1))] = draw(ANY_JSON)
    return value


@settings(max_examples=400, deadline=None)
@given(bodies() | ANY_JSON)
@example(completion(prompt_tokens=float("inf")))
@example(completion("a\ud800b"))
def test_any_json_is_a_response_or_an_endpoint_error(body):
    try:
        response = parse_completion(body)
    except EndpointError:
        return
    assert (
        TeacherResponse.from_json({**json.loads(json.dumps(response_fields(response)))}) == response
    )
    response.text.encode()


def response_fields(response: TeacherResponse) -> dict[str, object]:
    return {name: getattr(response, name) for name in TeacherResponse.__slots__}


TOKENS = st.binary(max_size=30) | st.sampled_from(
    [b"gzip", b"chunked", b"0", b"-1", b"9" * 30, b"text/html; charset=x", b"application/json",
     b"application/json; charset=utf-16", b"close", b"keep-alive", b"/", b"//", b"http://[", b"%"]
)  # fmt: skip
HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"Content-Type", b"Content-Length", b"Content-Encoding", b"Location",
                         b"Transfer-Encoding", b"Connection", b"Retry-After", b"Set-Cookie"])
        | st.binary(min_size=1, max_size=10),
        TOKENS,
    ),
    max_size=4,
)  # fmt: skip
STATUS_LINES = st.sampled_from(
    [b"HTTP/1.1 200 OK", b"HTTP/1.1 204 None", b"HTTP/1.1 307 Moved", b"HTTP/1.0 200 OK",
     b"HTTP/1.1 429 Slow", b"HTTP/1.1 500 Oh", b"HTTP/1.1 999 ?", b"HTTP/9 200", b"ICY 200 OK"]
) | st.binary(max_size=20)  # fmt: skip
RESPONSES = st.tuples(
    STATUS_LINES, HEADERS, bodies().map(lambda b: json.dumps(b).encode()) | st.binary(max_size=200)
)
_current: list[bytes] = []


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[RawServer]:
    with RawServer(lambda *_: list(_current)) as server:
        yield server


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(RESPONSES)
def test_any_bytes_are_a_value_or_an_endpoint_error(fuzzed, response):
    status, headers, data = response
    lines = [status, *(name + b": " + value for name, value in headers)]
    _current[:] = [b"\r\n".join([*lines, b"", data])]
    try:
        parse_completion(post(fuzzed))
    except EndpointError as error:
        assert str(error).isprintable()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(RESPONSES, min_size=12, max_size=12))
def test_a_distillation_with_any_responses_ends_with_all_of_them_counted(run_distill, responses):
    sent = (
        [
            b"\r\n".join(
                [status, *(n + b": " + v for n, v in headers), b"Connection: close", b"", data]
            )
        ]
        for status, headers, data in responses
    )
    with RawServer(teacher(sent)) as server:
        code, printed, summary = run_distill(server)
    assert "Traceback" not in printed
    if (
        "TeacherError: teacher: must answer, but failed" in printed
        or "teacher: must answer" in printed
    ):
        assert code in (1, 2)  # Rejected at the start, or too many failures in a row.
    else:
        assert code == (1 if summary["failed"] else 0), printed
        assert summary["answered"] + summary["failed"] == 12
