"""The client of a vLLM server against servers that send something else than vLLM does."""

from __future__ import annotations

import json
import math
import threading
from http.server import ThreadingHTTPServer

import pytest
from http_handler import JsonHandler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gft_lite.rollout.base import Completion, RolloutError
from gft_lite.rollout.vllm_client import VllmClient
from gft_lite.rollout.vllm_common import VllmRequest, scoring_request
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.openai_client import Endpoint, EndpointError

VOCABULARY, CONTEXT = 100, 32
SAMPLE = VllmRequest((5, 6), {"max_tokens": 4, "seed": 1})
CARD = {"id": "base", "parent": None, "max_model_len": CONTEXT}
CHOICE = {
    "token_ids": [7, 8],
    "logprobs": {"token_logprobs": [-0.5, -1.25]},
    "prompt_logprobs": [None, {"6": {"logprob": -2.0}, "9": {"logprob": -0.1}}],
    "finish_reason": "stop",
}


class Server(ThreadingHTTPServer):
    """Sends `models` and `completion`, both as text."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = json.dumps({"data": [CARD]})
        self.completion = json.dumps({"choices": [CHOICE]})
        self.status = 200
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def client(self):
        endpoint = Endpoint(f"http://127.0.0.1:{self.server_port}", timeout=20, retries=0)
        return VllmClient(endpoint, CONTEXT, VOCABULARY)


class Handler(JsonHandler):
    server: Server

    def do_GET(self):
        self.answer(200, self.server.models)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(self.server.status, self.server.completion)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(server):
    return server.client()


def test_a_completion_and_a_score(client):
    assert client.sample(SAMPLE) == Completion((7, 8), (-0.5, -1.25), "stop")
    assert client.score(scoring_request((5,), (6,), CONTEXT), (6,)) == [-2.0]
    assert client.score(scoring_request((5, 6), (), CONTEXT), ()) == []


MALFORMED = [
    "", "no json", "[]", "null", "{}", '{"choices": null}', '{"choices": []}', '{"choices": [1]}',
    "[" * 100_000, json.dumps({"choices": [CHOICE, CHOICE]}),
    *(
        json.dumps({"choices": [CHOICE | change]})
        for change in (
            {"token_ids": None}, {"token_ids": []}, {"token_ids": "78"}, {"token_ids": {"7": 8}},
            {"token_ids": [7, -8]}, {"token_ids": [7, VOCABULARY]}, {"token_ids": [7, 8.0]},
            {"token_ids": [7, True]}, {"token_ids": [7] * 5}, {"token_ids": [7]},
            {"logprobs": None}, {"logprobs": {}}, {"logprobs": {"token_logprobs": [-1.0]}},
            {"logprobs": {"token_logprobs": [-1.0, None]}},
            {"logprobs": {"token_logprobs": [-1.0, "-1"]}},
            {"logprobs": {"token_logprobs": [-1.0, math.nan]}},
            {"logprobs": {"token_logprobs": [-1.0, -math.inf]}},
            {"finish_reason": None}, {"finish_reason": "abort"}, {"finish_reason": ["stop"]},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("completion", MALFORMED, ids=lambda text: text[:60] or "empty")
def test_a_malformed_completion_is_a_failure_of_the_server(server, client, completion):
    server.completion = completion
    with pytest.raises(EndpointError) as caught:
        client.sample(SAMPLE)
    assert caught.value.transient
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "listed",
    [None, [], [None], [{}], [{"6": {}}], [{"6": None}], [{"6": {"logprob": math.nan}}], "6",
     [{"9": {"logprob": -1}}], {"6": -1}],
)  # fmt: skip
def test_malformed_scores_are_a_failure_of_the_server(server, client, listed):
    server.completion = json.dumps({"choices": [CHOICE | {"prompt_logprobs": listed}]})
    with pytest.raises(EndpointError, match="malformed completion"):
        client.score(VllmRequest((6,), {}), (6,))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text("ab7", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*CHOICE, "token_logprobs", "6"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(name=st.sampled_from([*CHOICE]), value=_JSON)
def test_whatever_a_server_sends_is_a_completion_or_its_failure(server, client, name, value):
    server.completion = json.dumps({"choices": [CHOICE | {name: value}]})
    try:
        found = client.sample(SAMPLE)
    except EndpointError:
        return
    assert 1 <= len(found.token_ids) == len(found.logprobs) <= 4
    assert all(0 <= i < VOCABULARY for i in found.token_ids)
    assert all(math.isfinite(x) for x in found.logprobs)


@pytest.mark.parametrize(
    ("models", "rule"),
    [
        ("{}", "lists no models"),
        ('{"data": [1]}', "lists no models"),
        ('{"data": []}', "or more, got 0 at http"),
        *(
            (json.dumps({"data": [CARD | {"max_model_len": length}]}), f"or more, got {shown}")
            for length, shown in ((None, "0"), ("64", "'64'"), (31, "31"), ([64], r"\[64\]"))
        ),
        (json.dumps({"data": [CARD | {"parent": "x"}]}), "or more, got 0"),
    ],
)
def test_a_server_that_is_unfit_is_a_recipe_error(server, models, rule):
    server.models = models
    with pytest.raises(RecipeError, match=f"rollout.servers: must be vLLM servers.*{rule}"):
        server.client()


def test_a_rejected_request_repeats_one_line_of_the_servers_text(server, client):
    server.status, server.completion = 400, json.dumps({"error": "too\nlong " * 500})
    with pytest.raises(RolloutError, match=r"rejected the request .*answered 400") as caught:
        client.sample(SAMPLE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
