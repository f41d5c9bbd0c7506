"""Rollouts over HTTP from a real vLLM server on the CPU, against transformers + peft in fp32."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from waiting import wait_until

from gft_lite.cli import main
from gft_lite.lab import rows
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout import child_supervisor, vllm_server_engine
from gft_lite.rollout.base import EngineFailed, Request, RolloutError, Sampling
from gft_lite.rollout.restarting_engine import RestartingEngine
from gft_lite.rollout.transformers_engine import TransformersEngine
from gft_lite.rollout.vllm_client import KEY_VARIABLE
from gft_lite.rollout.vllm_common import LORA_RANKS, engine_options
from gft_lite.rollout.vllm_launcher import server_command
from gft_lite.rollout.vllm_server_engine import VllmServerEngine
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.openai_client import Endpoint

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason='needs vllm: pip install "gft-lite[vllm]"'
    ),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.usefixtures("one_thread"),
]

GAP = 1e-4  # In nats; fp32 on both sides.
GREEDY = Sampling(temperature=0, max_tokens=8)
WARM = Sampling(temperature=0.7, max_tokens=8)
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # As /proc/net/tcp writes them.


@pytest.fixture(scope="module")
def policy():
    policy = load_policy(PolicySettings(gradient_checkpointing=False, context=128))
    policy.model.train()
    return policy


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def engine(policy, scratch):
    """The engine that starts a server: the real one, for all tests of this file."""
    engine = VllmServerEngine(_settings(), policy, scratch)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine):
    """Address and key of that server, as another process of this user could read them."""
    _, serving, *_ = _family()
    texts = (_proc(serving, "cmdline") + _proc(serving, "environ")).split("\0")
    port, key = (
        next(t.removeprefix(name) for t in texts if t.startswith(name))
        for name in ("--port=", "VLLM_API_KEY=")
    )
    return f"http://127.0.0.1:{port}", key


@pytest.fixture
def connect(server, proxy, policy, scratch, monkeypatch):
    """An engine that connects to running servers; it is closed before the proxy."""
    engines = []

    def connect(*urls, key=server[1]):
        monkeypatch.setenv(KEY_VARIABLE, key)
        engines.append(VllmServerEngine(_settings(servers=list(urls)), policy, scratch))
        return engines[-1]

    yield connect
    for engine in engines:
        engine.close()


@pytest.fixture
def proxy(server):
    """A second address of the same server, with faults."""
    proxy = _Proxy(server[0])
    yield proxy
    proxy.over.set()
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture(scope="module")
def publish(policy, tmp_path_factory):
    """Give the policy a new random adapter, save it under a fresh path, return that and a version.

    The scale makes every adapter move log-probs by far more than GAP.
    """
    folder, versions = tmp_path_factory.mktemp("adapters"), itertools.count(1)

    def publish():
        version = next(versions)
        generator = torch.Generator().manual_seed(version)
        for parameter in policy.parameters().values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        return policy.save_adapter(folder / f"v{version}"), version

    return publish


class _Proxy(ThreadingHTTPServer):
    """Passes requests on to `target`; `faults` are applied to the next completion requests."""

    daemon_threads = True

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target.removeprefix("http://")
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: list[str] = []
        self.always = ""
        self.loads = 0  # The status with which adapters are refused, if they are.
        self.over = threading.Event()
        self.samples = 0
        self.times: list[float] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: _Proxy

    def do_GET(self):
        self._pass_on(None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
        if self.path.endswith("/load_lora_adapter") and self.server.loads:
            return self._answer(self.server.loads, b'{"error": "no room"}', {})
        if not self.path.endswith("/completions"):
            return self._pass_on(body)
        self.server.samples += 1
        self.server.times.append(time.monotonic())
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        if fault == "drop":
            self.close_connection = True
        elif fault == "hang":
            self.server.over.wait(60)
        elif fault == "base":
            self._pass_on(body | {"model": "base"})
        elif fault == "processed":
            self._pass_on(body, lambda answer: _edited(answer, _sharpen))
        elif fault == "alien":
            self._pass_on(body, lambda answer: _edited(answer, lambda c: c.pop("token_ids")))
        elif fault:
            self._answer(int(fault), b'{"error": "out of order"}', {"Retry-After": "1"})
        else:
            self._pass_on(body)

    def _pass_on(self, body, change=lambda content: content):
        link = http.client.HTTPConnection(self.server.target)
        headers = {
            n: self.headers[n] for n in ("Authorization", "Content-Type") if n in self.headers
        }
        content = None if body is None else json.dumps(body)
        link.request(self.command, self.path, content, headers)
        answer = link.getresponse()
        kind = {"Content-Type": answer.headers["Content-Type"]}
        self._answer(answer.status, change(answer.read()), kind)
        link.close()

    def _answer(self, status, content, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(content)}).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


def _edited(content, edit):
    answer = json.loads(content)
    edit(answer["choices"][0])
    return json.dumps(answer).encode()


def _sharpen(choice):
    """Log-probs as of half the temperature, but for their denominator."""
    found = choice["logprobs"]["token_logprobs"]
    choice["logprobs"]["token_logprobs"] = [2 * logprob for logprob in found]


def _settings(**settings):
    dtype = {} if settings.get("servers") else {"dtype": "float32"}
    return RolloutSettings(
        engine="vllm_server", kv_cache_mib=16, batch_size=8, **(dtype | settings)
    )


def _requests(policy, seeds=(1,)):
    texts = ("12+34=", "7*8=", "100-1=", "5+5=")
    return [Request(tuple(policy.tokenizer.encode(t)), tuple(seeds)) for t in texts]


def _gap(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _assert_agree(found, expected):
    """Equal samples; log-probs are rounded differently with the rows that a server joins."""
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
            assert _gap(a.logprobs, b.logprobs) < GAP


def _exact(policy, *, base=False):
    """The trainer's own engine, whose scores are those of one forward."""
    engine = TransformersEngine(RolloutSettings(), policy, Path())
    if not base:
        engine.sync(Path(), 1)
    return engine


def _assert_serves(engine, policy, *, base=False):
    exact = _exact(policy, base=base)
    for request, [sample] in zip(
        _requests(policy), engine.generate(_requests(policy), WARM), strict=True
    ):
        scores = exact.score(request.prompt_ids, sample.token_ids)
        assert _gap(sample.logprobs, scores) < GAP
        assert _gap(engine.score(request.prompt_ids, sample.token_ids), scores) < GAP


def _family():
    """The server's processes as they started: the supervisor, the server and what it started."""
    supervised = [child_supervisor.__file__, str(os.getpid())]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            number = int(folder.name)
            if _proc(os.getsid(number), "cmdline").split("\0")[2:4] == supervised:
                # Numbers begin anew where the highest was given.
                started = int(_proc(number, "stat").rpartition(")")[2].split()[19])
                found.append((started, number))
    return [number for _, number in sorted(found)]


def _proc(number, file):
    return Path(f"/proc/{number}/{file}").read_text()


def test_greedy_tokens_are_those_of_the_transformers_engine(engine, policy, publish):
    requests = _requests(policy, (1, 2))
    for base in (True, False):
        engine.sync(*((None, 0) if base else publish()))
        expected = _exact(policy, base=base).generate(requests, GREEDY)
        for theirs, ours in zip(expected, engine.generate(requests, GREEDY), strict=True):
            assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
            assert [c.finish_reason for c in ours] == [c.finish_reason for c in theirs]
            for a, b in zip(ours, theirs, strict=True):
                assert _gap(a.logprobs, b.logprobs) < GAP


@pytest.mark.parametrize("stop", [("#",), (";", "#"), ("<",), ("#1", "#2", "#3"), tuple("bcdef#")])
def test_stop_strings_end_samples_as_in_the_transformers_engine(engine, policy, stop):
    engine.sync(None, 0)
    sampling = Sampling(temperature=0, max_tokens=24, stop=stop)
    prompts = [tuple(policy.tokenizer.encode(row["problem"])) for row in rows("test", limit=8)]
    requests = [Request(prompt, (0,)) for prompt in prompts]
    expected = _exact(policy, base=True).generate(requests, sampling)
    for [theirs], [ours] in zip(expected, engine.generate(requests, sampling), strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)


def test_samples_depend_on_prompt_and_seed_alone(engine, policy):
    engine.sync(None, 0)
    requests = _requests(policy, (3, -1, 2**64 + 3, 4))
    first = engine.generate(requests, WARM)
    _assert_agree(engine.generate(requests, WARM), first)
    alone = [engine.generate([request], WARM)[0] for request in reversed(requests)]
    for whole, single in zip(first, reversed(alone), strict=True):
        assert [c.token_ids for c in single] == [c.token_ids for c in whole]
    assert len({c.token_ids for answers in first for c in answers}) > len(requests)
    assert all(len(c.logprobs) == len(c.token_ids) for answers in first for c in answers)


def test_log_probs_are_the_trainers_at_every_temperature(engine, policy, publish):
    engine.sync(*publish())
    _assert_serves(engine, policy)
    engine.sync(None, 0)
    _assert_serves(engine, policy, base=True)


def test_stop_strings_and_the_end_of_the_context(engine, policy):
    engine.sync(None, 0)
    [request, *_] = _requests(policy)
    [[whole]] = engine.generate([request], Sampling(temperature=0, max_tokens=6))
    stop = whole.token_ids[1]
    end = whole.token_ids.index(stop) + 1
    text = policy.tokenizer.decode([stop])
    [[cut]] = engine.generate([request], Sampling(temperature=0, max_tokens=6, stop=(text,)))
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:end], "stop")
    assert len(whole.token_ids) > end
    [[last]] = engine.generate([Request((60,) * 126, (1,))], GREEDY)
    assert len(last.token_ids) <= 2
    with pytest.raises(RolloutError, match="1 to 127 tokens, got 128"):
        engine.generate([request, Request((60,) * 128, (1,))], GREEDY)
    with pytest.raises(RolloutError, match=r"rejected the request.*temperature"):
        engine.generate([request], Sampling(temperature=3.0))
    assert engine.generate([], GREEDY) == []
    assert engine.generate([Request((60,), ())], GREEDY) == [[]]
    assert engine.score((60,), ()) == []


def test_old_adapters_are_unloaded_under_their_own_names(engine, server, publish):
    listed = Endpoint(*server).models
    names = []
    for _ in range(2):
        engine.sync(*publish())
        [base, name] = listed()
        assert base == "base"
        names.append(name)
    assert len(set(names)) == 2
    engine.sync(None, 0)
    assert list(listed()) == ["base"]


def test_requests_to_the_base_leave_the_adapters_slot_alone(engine, server, policy, publish):
    """They come from another user of the server; see the test of the same name in test_vllm."""
    for _ in range(2):
        engine.sync(*publish())
        for request in _requests(policy)[:2]:
            _assert_serves(engine, policy)
            body = {"model": "base", "prompt": list(request.prompt_ids), "max_tokens": 4}
            Endpoint(*server).post("completions", body)
            _assert_serves(engine, policy)
    engine.sync(None, 0)


def test_several_servers_take_requests_in_turn_and_agree(connect, server, proxy, policy, publish):
    requests = _requests(policy, (1, 2, 3))
    one = connect(server[0])
    adapter, version = publish()
    one.sync(adapter, version)
    expected = one.generate(requests, WARM)
    two = connect(server[0], proxy.url)
    two.sync(adapter, version)
    proxy.samples = 0
    _assert_agree(two.generate(requests, WARM), expected)
    assert proxy.samples == 2 * 3  # Every other prompt, with all its samples.
    _assert_serves(two, policy)
    two.close()
    one.close()
    assert list(Endpoint(*server).models()) == ["base"]


def test_transient_failures_are_retried(connect, proxy, policy):
    engine = connect(proxy.url)
    expected = engine.generate(_requests(policy), WARM)
    proxy.faults = ["500", "drop", "503", "429"]
    _assert_agree(engine.generate(_requests(policy), WARM), expected)
    proxy.faults, proxy.times = ["429"], []
    [request, *_] = _requests(policy)
    _assert_agree(engine.generate([request], WARM), expected[:1])
    refused, repeated = proxy.times
    assert repeated - refused >= 1  # As Retry-After said.


@pytest.mark.parametrize("fault", ["500", "drop", "404"])
def test_a_server_that_keeps_failing_is_dropped(
    connect, server, proxy, policy, publish, fault, monkeypatch, caplog
):
    monkeypatch.setattr(vllm_server_engine, "RETRIES", 0)
    engine = connect(proxy.url, server[0])
    engine.sync(*publish())
    proxy.always = fault
    _assert_serves(engine, policy)
    assert f"{proxy.url}/v1" in caplog.text and "continuing without one server" in caplog.text
    proxy.samples = 0
    engine.sync(*publish())
    _assert_serves(engine, policy)
    assert proxy.samples == 0


def test_the_callback_gets_each_completion_as_soon_as_it_arrives(connect, server, proxy, policy):
    engine = connect(proxy.url, server[0])
    slow, fast, *_ = _requests(policy, (1, 2))
    proxy.always = "hang"
    seen = {}

    def note(prompt_ids, seed, completion):
        seen[prompt_ids, seed] = completion
        if len(seen) == 2:  # The other server's, while this one keeps us waiting.
            assert {prompt_ids for prompt_ids, _ in seen} == {fast.prompt_ids}
            proxy.always = ""
            proxy.over.set()

    answers = engine.generate([slow, fast], WARM, note)
    keys = [(r.prompt_ids, s) for r in (slow, fast) for s in r.seeds]
    assert [seen[key] for key in keys] == [c for found in answers for c in found]


def test_an_interrupt_does_not_wait_for_responses(connect, proxy, policy):
    engine = connect(proxy.url)
    proxy.always = "hang"

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            engine.generate(_requests(policy), WARM)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not proxy.over.is_set()  # No response has arrived, and none is awaited.
    proxy.always = ""
    _assert_serves(engine, policy, base=True)


def test_the_failure_of_the_last_server_is_an_engine_failure(connect, proxy, policy, monkeypatch):
    monkeypatch.setattr(vllm_server_engine, "RETRIES", 0)
    engine = connect(proxy.url)
    proxy.always = "500"
    with pytest.raises(EngineFailed, match=r"no server is left.*answered 500: .*out of order"):
        engine.generate(_requests(policy), WARM)
    with pytest.raises(RolloutError, match="closed"):
        engine.score((60,), (61,))
    with pytest.raises(RecipeError, match=r"must have one that answers.*refused"):
        connect("http://127.0.0.1:1")


def test_a_server_with_other_weights_is_detected(connect, server, proxy, policy, publish):
    engine = connect(server[0], proxy.url)
    engine.sync(*publish())
    proxy.always = "base"
    with pytest.raises(RolloutError, match=r"agree within 0\.2 nats per token, got .*" + proxy.url):
        engine.score(*[tuple(policy.tokenizer.encode(t)) for t in ("12+34=", "46#46")])


@pytest.mark.parametrize("key", ["", "not-the-key-of-this-server"])
def test_a_wrong_key_is_named_but_not_shown(connect, server, key):
    with pytest.raises(RecipeError, match=f"answered 401.*{KEY_VARIABLE}") as caught:
        connect(server[0], key=key)
    assert not key or key not in str(caught.value)


def test_the_key_goes_to_other_machines_over_https_only(connect):
    with pytest.raises(RecipeError, match=r"must be https, .* got http://192\.0\.2\.1:8000/v1"):
        connect("http://192.0.2.1:8000", key="some-key-of-my-servers")


def test_unfit_servers_are_recipe_errors(connect, server, proxy, policy, monkeypatch):
    proxy.faults = ["processed"]
    with pytest.raises(RecipeError, match=r"--logprobs-mode raw_logprobs.*" + proxy.url):
        connect(proxy.url)
    proxy.faults = ["alien"]
    with pytest.raises(RecipeError, match="malformed completion"):
        connect(proxy.url)
    monkeypatch.setattr(policy, "context", 129)
    with pytest.raises(RecipeError, match=r"--max-model-len 129 .*or more, got 128"):
        connect(server[0])


DAMAGES = {
    "missing folder": (shutil.rmtree, "must be a folder with a PEFT adapter"),
    "unreadable for the server": (
        lambda a: (a / "adapter_config.json").unlink(),
        "must load in vllm.*the same path",
    ),
    "cut file": (
        lambda a: os.truncate(a / "adapter_model.safetensors", 500),
        "must be a folder with a PEFT adapter",
    ),
    "not for vllm": (
        lambda a: (a / "adapter_config.json").write_text(
            (a / "adapter_config.json").read_text().replace('"use_dora": false', '"use_dora": true')
        ),
        "must load in vllm.*answered 500",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_adapter_is_an_error_and_the_old_one_stays(
    connect, server, proxy, policy, publish, name
):
    engine = connect(server[0], proxy.url)
    damage, message = DAMAGES[name]
    bad, version = publish()
    damage(bad)
    good, _ = publish()
    engine.sync(good, version)
    before = Endpoint(*server).models().keys()
    with pytest.raises(RolloutError, match=message):
        engine.sync(bad, version + 1)
    assert Endpoint(*server).models().keys() == before
    _assert_serves(engine, policy)


def test_an_adapter_that_one_server_rejects_is_served_by_none(
    connect, server, proxy, policy, publish
):
    engine = connect(server[0], proxy.url)
    bad, version = publish()
    engine.sync(*publish())
    before = Endpoint(*server).models().keys()
    proxy.loads = 500
    with pytest.raises(RolloutError, match=rf"must load in vllm.*{proxy.url}.*no room"):
        engine.sync(bad, version)
    assert Endpoint(*server).models().keys() == before
    _assert_serves(engine, policy)


def test_only_the_key_opens_the_server(server):
    """Those that vLLM's own check leaves open, too."""
    url, key = server

    def status(path, key):
        request = urllib.request.Request(f"{url}{path}", b"{}" if path != "/health" else None)
        request.add_header("Authorization", f"Bearer {key}")
        request.add_header("Content-Type", "application/json")
        try:
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/health", "none") == 200
    for path in ("/v1/load_lora_adapter", "/adapters", "/invocations", "/tokenize", "/ping"):
        assert status(path, "none") == 401, path
        assert status(path, key) in (200, 400), path


def test_the_key_is_in_the_environment_only_and_the_port_on_loopback(engine, server, scratch):
    assert len(_family()) > 2
    assert not [number for number in _family() if server[1] in _proc(number, "cmdline")]
    files = [f for f in scratch.rglob("*") if f.is_file()]
    assert scratch / "server.log" in files
    assert not [f for f in files if server[1].encode() in f.read_bytes()]
    assert _listening() and set(_listening()) <= LOOPBACK


def _listening():
    """The addresses on which the server's processes listen."""
    links = [link for number in _family() for link in Path(f"/proc/{number}/fd").iterdir()]
    own = {os.readlink(link)[8:-1] for link in links if os.path.lexists(link)}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, address, _, state, *rest = line.split()
            if state == "0A" and rest[5] in own:
                yield address.split(":")[0]


_PARENT = """
import os, subprocess, sys
command = [sys.executable, sys.argv[1], str(os.getpid()), "sh", "-c", "sleep 3210 & sleep 3210"]
print(subprocess.Popen(command).pid, flush=True)
input()
"""


def test_what_a_killed_trainer_started_ends_with_it():
    starter = [sys.executable, "-c", _PARENT, child_supervisor.__file__]
    parent = subprocess.Popen(starter, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    group = int(parent.stdout.readline())
    try:
        # The supervisor, the shell, and both its children.
        wait_until(lambda: len(_of_group(group)) == 4)
        parent.kill()
        parent.wait()
        wait_until(lambda: not _of_group(group))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        parent.communicate()


def _of_group(group):
    done = subprocess.run(["ps", "-eo", "pgid="], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.split() if int(line) == group]


def test_a_server_that_cannot_start_gives_the_cause_from_its_log(policy, tmp_path, monkeypatch):
    (tmp_path / "server.log").write_text("ValueError: of an earlier start\n")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(RolloutError) as caught:
        VllmServerEngine(_settings(), policy, tmp_path)
    assert str(caught.value) == (
        "rollout.engine: the vllm server could not start "
        "(ModuleNotFoundError: No module named 'encodings')."
    )


_PARSE = """
import json, sys
from typing import get_args
from vllm.config.lora import MaxLoRARanks
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
print(json.dumps([get_args(MaxLoRARanks), vars(arguments)], default=str))
"""


def test_vllm_parses_the_options_for_a_gpu(policy, monkeypatch):
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    options = engine_options(_settings(gpu_memory=0.4, eager=False), policy)
    arguments = server_command("http://127.0.0.1:8000", options)
    serving = arguments[arguments.index("vllm.entrypoints.openai.api_server") + 1 :]
    parse = [sys.executable, "-c", _PARSE, *serving]
    done = subprocess.run(parse, capture_output=True, text=True, check=True)
    distributed, parsed = json.loads(done.stdout.splitlines()[-1])
    assert tuple(distributed) == LORA_RANKS
    assert {name: parsed[name] for name in options} == options
    assert {"gpu_memory_utilization", "enable_sleep_mode", "enforce_eager"} <= options.keys()


def test_training_with_a_server_of_the_users_own(server, tmp_path, monkeypatch, capsys):
    url, key = server
    monkeypatch.setenv(KEY_VARIABLE, key)
    training = [
        "train", "recipes/lab.yaml", "--out", str(tmp_path / "run"),
        "rollout.engine=vllm_server", f"rollout.servers=[{url}]", "policy.context=128",
        "train.steps=2",
        "train.problems_per_step=2", "data.problems=20", "data.holdout=2", "monitor.every=1",
        "monitor.problems=1", "eval.samples=1", "eval.k=[1]", "eval.sets.test.problems=1",
        "eval.sets.retention.problems=1",
    ]  # fmt: skip
    assert main(training) == 0
    assert "engine: vllm_server, base the servers'" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_killed_server_is_started_again(engine, policy, publish, tmp_path):
    """The last test of this file, since it kills the server that the others share."""
    engines = iter([engine])
    output = StringIO()
    again = RestartingEngine(
        lambda: next(engines, None) or VllmServerEngine(_settings(), policy, tmp_path),
        Console(file=output),
    )
    try:
        again.sync(*publish())
        expected = again.generate(_requests(policy), WARM)
        _, serving, *_ = _family()
        os.kill(serving, signal.SIGKILL)
        _assert_agree(again.generate(_requests(policy), WARM), expected)
        assert "no server is left" in output.getvalue() and "Starting it again" in output.getvalue()
        _assert_serves(again, policy)
    finally:
        again.close()
    assert not _family()
