"""The HTTP client: addresses, responses, limits; retries are tested in test_vllm_server.py."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gft_lite.utils.openai_client import Endpoint, EndpointError, key_from

KEY = "a-key-of-twenty-letters"
ANSWERS = {
    "/v1/models": (200, "application/json", b'{"data": [{"id": "base"}, {"id": "own"}]}'),
    "/v1/text": (200, "text/plain", b"Success"),
    "/v1/broken": (200, "application/json", b'{"a'),
    "/v1/refused": (400, "application/json", b'{"error": {"message": "no such thing"}}'),
    "/v1/unknown": (401, "application/json", b'{"error": "who is %s"}' % KEY.encode()),
    "/v1/long": (500, "text/html", b"x" * 2000),
    "/other/models": (200, "text/html", b"<html>welcome</html>"),
}


@pytest.fixture(scope="module")
def server():
    """A server that answers by the table and records the headers of the last request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, kind, content = ANSWERS[self.path]
            self.server.headers = dict(self.headers)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def endpoint(server):
    endpoint = Endpoint(server.url, KEY, retries=0)
    yield endpoint
    endpoint.close()


def test_json_responses_are_parsed(endpoint):
    assert list(endpoint.models()) == ["base", "own"]
    assert endpoint.get("text") == "Success"
    assert endpoint.get(f"{endpoint.root}/v1/text") == "Success"


@pytest.mark.parametrize(
    ("path", "text", "status", "transient"),
    [
        ("refused", "answered 400: no such thing", 400, False),
        ("unknown", 'answered 401: {"error": "who is ***"}', 401, False),
        ("long", f"answered 500: {'x' * 500} ...", 500, True),
        ("broken", "answered with broken JSON", 200, True),
    ],
)
def test_errors_have_the_reason_and_not_the_key(endpoint, path, text, status, transient):
    with pytest.raises(EndpointError) as caught:
        endpoint.get(path)
    assert str(caught.value).startswith(f"{endpoint.url}: {text}")
    assert (caught.value.status, caught.value.transient) == (status, transient)


def test_errors_for_other_servers_and_closed_ports(server):
    with pytest.raises(EndpointError, match="must be an OpenAI-compatible server") as caught:
        Endpoint(f"{server.url}/other", retries=0).models()
    assert not caught.value.transient
    with pytest.raises(
        EndpointError, match=r"127\.0\.0\.1:1/v1: gave no answer: Connection refused"
    ) as caught:
        Endpoint("http://127.0.0.1:1", retries=0).models()
    assert caught.value.transient


@pytest.mark.parametrize(
    ("url", "base", "loopback", "exposes"),
    [
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1", True, False),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1", True, False),
        ("http://[::1]:8000", "http://[::1]:8000/v1", True, False),
        ("http://10.0.0.7:8000", "http://10.0.0.7:8000/v1", False, True),
        ("https://api.example.org/openai", "https://api.example.org/openai", False, False),
    ],
)
def test_addresses(url, base, loopback, exposes):
    endpoint = Endpoint(url, KEY)
    assert endpoint.url == base
    assert (endpoint.is_loopback, endpoint.exposes_key) == (loopback, exposes)
    assert not Endpoint(url).exposes_key


def test_no_other_key_of_the_user_and_no_proxy_gets_the_request(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "the-users-own-secret")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    Endpoint(server.url, retries=0).models()
    assert "the-users-own-secret" not in str(server.headers)
    Endpoint(server.url, KEY, retries=0).models()
    assert f"Bearer {KEY}" in server.headers.values()


def test_the_key_is_read_from_the_first_variable_that_is_set(monkeypatch):
    monkeypatch.delenv("GFT_LITE_FIRST_KEY", raising=False)
    monkeypatch.setenv("GFT_LITE_SECOND_KEY", "two")
    assert key_from("GFT_LITE_FIRST_KEY", "GFT_LITE_SECOND_KEY") == "two"
    monkeypatch.setenv("GFT_LITE_FIRST_KEY", "one")
    assert key_from("GFT_LITE_FIRST_KEY", "GFT_LITE_SECOND_KEY") == "one"
    assert key_from("GFT_LITE_THIRD_KEY") is None
