"""`gft-lite distill` with a local model, with a real vLLM server and with a faulty one."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest
from rich.console import Console
from waiting import wait_until

from gft_lite import lab
from gft_lite.cli import main
from gft_lite.data.problems import load_problems
from gft_lite.data.prompts import PromptFormat
from gft_lite.distillation.pipeline import distill
from gft_lite.distillation.teachers import TeacherError, TeacherSettings
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.rollout.vllm_launcher import free_port
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import UserError
from gft_lite.utils.openai_client import Endpoint, EndpointError

KEY = "GFT_LITE_TEACHER_KEY"
TOKEN = "0123456789-of-the-server"
QUIET = Console(quiet=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a recipe on 12 problems that have an expert and no teacher."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"nr": i, "q": row["problem"], "a": row["answer"], "gold": {"solution": row["expert"][0]}}
        for i, row in enumerate(lab.rows("train", 12))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"problem": "q", "answer": "a", "expert": "gold.solution", "teacher": []}
    own = {
        "extends": "recipes/lab.yaml",
        "data": {"source": "rows.jsonl", "columns": columns},
        "group": {"expert": 1, "teacher": 2, "self": 1, "shortfall": "repeat"},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(own))
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_distill(teacher, out, *overrides, **settings):
    recipe = Recipe.load("r.yaml", overrides)
    return distill(recipe, str(teacher), out, TeacherSettings(**settings), console=QUIET)


# --- a model on this machine -----------------------------------------------------------------


def test_teacher_responses_are_trained_on(here, capsys):
    """From the command line to the groups of a run, with counts taken from the file."""
    arguments = [
        "r.yaml",
        "--teacher",
        "lab",
        "--limit",
        "10",
        "--samples",
        "5",
        "--price-out",
        "2",
    ]
    assert main(["distill", *arguments, "rollout.engine=transformers"]) == 0
    shown = capsys.readouterr().out
    assert "extend data/lab-lab.distill/data.yaml" in shown
    source = {row["nr"]: row for row in read(here / "rows.jsonl")}
    rows = read(here / "data/lab-lab.jsonl")
    kept = read(here / "data/lab-lab.distill/responses.jsonl")
    assert len(rows) == 10
    for row in rows:
        new = {name: row.pop(name) for name in list(row) if name.startswith("teacher")}
        assert row == source[row["nr"]]
        # The rule of the lab: what follows the last #.
        right = [float(text.rpartition("#")[2] == row["a"]) for text in new["teacher"]]
        assert new["teacher_rewards"] == right
        assert len(new["teacher_verdicts"]) == len(right) == len(set(new["teacher"]))
        assert new["teacher_model"] == "lab"
    rows = read(here / "data/lab-lab.jsonl")
    summary = json.loads((here / "data/lab-lab.distill/summary.json").read_text())
    offered = sum(len(row["teacher"]) for row in rows)
    assert 0 < summary["right"] < summary["answered"] == len(kept) == 50
    assert (
        summary["offered"]
        == offered
        == 50 - sum(summary[name] for name in ("duplicates", "truncated", "empty"))
    )
    assert summary["problems_without_right_answer"] == sum(
        not any(row["teacher_rewards"]) for row in rows
    )
    assert summary["cost"] == 2 * sum(answer["completion_tokens"] for answer in kept) / 1e6

    (here / "t.yaml").write_text("extends: [r.yaml, data/lab-lab.distill/data.yaml]\n")
    small = ["train.steps=1", "train.problems_per_step=4", "eval.samples=1", "eval.k=[1]",
             "eval.sets.test.problems=1", "eval.sets.retention.problems=1", "monitor.problems=1",
             "data.holdout=2", "rollout.engine=transformers", "optim.lr=0.05"]  # fmt: skip
    assert main(["train", "t.yaml", *small, "--out", "run"]) == 0
    pairs = [zip(row["teacher"], row["teacher_rewards"], strict=True) for row in rows]
    graded = dict(itertools.chain(*pairs))
    taught = [r for group in RunFolder("run").groups(1) for r in group["responses"]
              if r["source"] == "teacher"]  # fmt: skip
    assert len(taught) == 8
    for response in taught:
        assert response["reward"] == graded[response["text"]]

    # A run can be the teacher: its adapter samples.
    greedy = ["--samples", "1", "--temperature", "0", "--out", "g.jsonl"]
    texts = []
    for teacher in ("lab", "run"):
        asked = [*greedy, "--teacher", teacher, "rollout.engine=transformers"]
        assert main(["distill", "r.yaml", *asked]) == 0
        texts.append([row["teacher"] for row in read(here / "g.jsonl")])
    assert texts[0] != texts[1]


def test_stored_responses_are_not_sampled_again(here):
    first = run_distill("lab", "a.jsonl", samples=2, limit=4)
    text = (here / "a.jsonl").read_bytes()
    again = run_distill("lab", "a.jsonl", samples=2, limit=4)
    assert (first["asked"], first["reused"]) == (8, 0)
    assert (again["asked"], again["reused"], again["answered"]) == (0, 8, 8)
    assert (here / "a.jsonl").read_bytes() == text
    more = run_distill("lab", "a.jsonl", samples=3, limit=5)
    assert (more["asked"], more["reused"]) == (7, 8)
    other = run_distill("lab", "a.jsonl", "seed=1", samples=3, limit=5)
    assert (other["asked"], other["reused"]) == (15, 0)
    # Stored responses are graded by the current reward rule.
    marked = "reward.functions=[{name: exact, parameters: {marker: '@@'}}]"
    regraded = run_distill("lab", "a.jsonl", marked, samples=3, limit=5)
    assert (regraded["asked"], regraded["right"]) == (0, 0)


INTERRUPTED = """
from itertools import count
from gft_lite.rollout.transformers_engine import TransformersEngine

class Engine(TransformersEngine):
    def generate(self, requests, sampling, on_completion):
        numbers = count(1)
        def stop(*completed):
            on_completion(*completed)
            if next(numbers) == 3:
                raise KeyboardInterrupt
        return super().generate(requests, sampling, stop)
"""


def test_an_interrupted_batch_loses_no_response(here):
    (here / "interrupted_engine.py").write_text(INTERRUPTED)
    with pytest.raises(KeyboardInterrupt):
        run_distill("lab", "a.jsonl", "rollout.engine=interrupted_engine:Engine", samples=2)
    stored = read(here / "a.distill/responses.jsonl")
    assert len(stored) == 3
    again = run_distill("lab", "a.jsonl", samples=2)
    assert (again["asked"], again["reused"], again["answered"]) == (21, 3, 24)
    assert read(here / "a.distill/responses.jsonl")[:3] == stored


def test_a_prompt_that_fills_the_context_is_a_failure(here):
    long = {"nr": 12, "q": "1+" * 2000, "a": "1", "gold": {"solution": "#1"}}
    with (here / "rows.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    summary = run_distill("lab", "a.jsonl", samples=1)
    assert (summary["answered"], summary["failed"]) == (12, 1)
    [reason] = summary["failures"]
    assert "context" in reason
    assert [row["nr"] for row in read(here / "a.jsonl") if not row["teacher"]] == [12]


def test_parquet_equals_jsonl(here):
    run_distill("lab", "a.jsonl", samples=2, limit=6)
    run_distill("lab", "a.parquet", samples=2, limit=6)
    (here / "no.yaml").write_text("extends: [r.yaml, a.distill/data.yaml]\n")
    data = Recipe.load("no.yaml").data
    assert data.source == "a.parquet"
    format = PromptFormat(load_policy(PolicySettings()).tokenizer, data.prompt)
    loaded = [
        load_problems(data.model_copy(update={"source": file}), format).problems
        for file in ("a.jsonl", "a.parquet")
    ]
    assert loaded[0] == loaded[1]
    assert all(1 <= len(problem.teachers) <= 2 for problem in loaded[0])
    texts = {row["nr"]: row["teacher"] for row in read(here / "a.jsonl")}
    assert [list(p.teachers) for p in loaded[0]] == [texts[p.columns["nr"]] for p in loaded[0]]


def test_a_second_teacher_has_its_own_column(here):
    run_distill("lab", "one.jsonl", samples=2)
    (here / "two.yaml").write_text("extends: [r.yaml, one.distill/data.yaml]\n")
    recipe = Recipe.load("two.yaml", ["seed=5"])
    distill(recipe, "lab", "two.jsonl", TeacherSettings(samples=1, column="other"), console=QUIET)
    one, two = read(here / "one.jsonl"), read(here / "two.jsonl")
    assert [row["teacher"] for row in two] == [row["teacher"] for row in one]
    assert all(len(row["other"]) <= 1 and row["other_model"] == "lab" for row in two)
    (here / "three.yaml").write_text("extends: [r.yaml, two.distill/data.yaml]\n")
    assert Recipe.load("three.yaml").data.columns.teacher == ["teacher", "other"]


# --- a real server ---------------------------------------------------------------------------

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a vLLM server with the lab's base, in fp32."""
    port = free_port()
    command = [
        # Not `vllm serve`, which the package for CPUs can't run.
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--host=127.0.0.1", f"--port={port}", f"--model={lab.BASE}", "--served-model-name=big"),
        *("--dtype=float32", "--enforce-eager", "--kv-cache-memory-bytes=67108864"),
        *("--block-size=32", "--max-model-len=96", "--uvicorn-log-level=warning"),
    ]
    own = {"VLLM_API_KEY": TOKEN, "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
           "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | own, stdout=out, stderr=out, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    endpoint = Endpoint(url, timeout=5, retries=0)
    try:
        for _ in range(9000):
            try:
                endpoint.get(f"{url}/health")
                break
            except EndpointError:
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.1)
        yield url
    finally:
        endpoint.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@needs_vllm
def test_a_server_and_a_local_engine_respond_equally(here, server, monkeypatch):
    """Greedy, in fp32, with the same chat template, on either engine."""
    monkeypatch.setenv(KEY, TOKEN)
    greedy = {"samples": 1, "temperature": 0}
    there = run_distill(server, "there.jsonl", **greedy)
    rows = read(here / "there.jsonl")
    assert there["answered"] == 12
    assert {row["teacher_model"] for row in rows} == {"big"}
    for engine, dtype in {"transformers": (), "vllm": ("rollout.dtype=float32",)}.items():
        exact = ("policy.quantization=none", f"rollout.engine={engine}", *dtype)
        local = run_distill("lab", f"{engine}.jsonl", *exact, **greedy)
        texts = [row["teacher"] for row in read(here / f"{engine}.jsonl")]
        assert texts == [row["teacher"] for row in rows]
        alike = ("right", "completion_tokens", "prompt_tokens", "truncated")
        assert [there[name] for name in alike] == [local[name] for name in alike]


@needs_vllm
def test_samples_of_a_server_depend_only_on_the_seed(here, server, monkeypatch):
    monkeypatch.setenv(KEY, TOKEN)
    for out, seed, concurrency in (("a", 0, 8), ("b", 0, 1), ("c", 1, 8)):
        run_distill(
            server, f"{out}.jsonl", f"seed={seed}", concurrency=concurrency, samples=2, limit=6
        )
    # The order of the rows is that of data.seed.
    a, b, c = ([row["teacher"] for row in read(here / f"{out}.jsonl")] for out in "abc")
    assert a == b != c


@needs_vllm
def test_a_server_checks_the_key_and_the_model(here, server, monkeypatch, capsys):
    """Exit code 2, the reason, and no key anywhere."""
    command = ["distill", "r.yaml", "--teacher", server, "--out", "a.jsonl", "--limit", "2"]
    for key, model, reason in (
        ("0123456789-of-another", "big", f"answered 401: .*{KEY}"),
        (TOKEN, "small", "answered 404: .*small"),
    ):
        monkeypatch.setenv(KEY, key)
        assert main([*command, "--model", model]) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("teacher: must answer, but ")
        assert re.search(reason, error)
        assert key not in error
    assert main(command) == 0
    files = [path for path in here.rglob("*") if path.is_file()]
    assert "responses.jsonl" in {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


# --- a faulty server --------------------------------------------------------------------------


class ScriptedServer:
    """An endpoint; `reply(body, number)` returns a status and the text of the answer or error.

    `bodies` are the requests in order of arrival, `keys` their Authorization headers.
    """

    def __init__(self, reply):
        self.bodies, self.keys, self.answered = [], [], []
        scripted, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.send(200, {"data": [{"id": "scripted"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    scripted.bodies.append(body)
                    scripted.keys.append(self.headers["Authorization"])
                    number = len(scripted.bodies) - 1
                status, text, *rest = reply(body, number)
                if status == 200:
                    choice = {"message": {"content": text}, "finish_reason": (*rest, "stop")[0]}
                    usage = {"prompt_tokens": 5, "completion_tokens": 7}
                    self.send(200, {"choices": [choice], "usage": usage})
                    scripted.answered.append(body)
                else:
                    self.send(status, {"error": {"message": text}})

            def send(self, status, value):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def seeds(self):
        return Counter(body["seed"] for body in self.bodies)


def text_of(body):
    return body["messages"][-1]["content"]


def test_requests_hold_prompt_and_sampling_settings(here):
    with ScriptedServer(lambda body, number: (200, f"#{number}")) as scripted:
        run_distill(
            scripted.url, "a.jsonl", samples=2, limit=3, temperature=0.3, top_p=0.9, max_tokens=11
        )
    source = {row["q"] for row in read(here / "rows.jsonl")}
    assert len(scripted.seeds()) == len(scripted.bodies) == 6
    assert all(0 <= seed < 2**31 for seed in scripted.seeds())
    assert set(Counter(map(text_of, scripted.bodies)).values()) == {2}
    for body in scripted.bodies:
        assert set(map(text_of, scripted.bodies)) < source
        assert {k: v for k, v in body.items() if k not in ("seed", "messages")} == {
            "model": "scripted", "temperature": 0.3, "top_p": 0.9, "max_tokens": 11,
        }  # fmt: skip


def test_each_kind_of_response_is_counted(here):
    """By number within the problem: complete, duplicate, truncated, empty, broken Unicode."""
    numbers = Counter()
    replies = [(200, "#a"), (200, "#a"), (200, "#b", "length"), (200, ""), (200, "#c\ud83d")]

    def reply(body, _):
        numbers[text_of(body)] += 1
        return replies[numbers[text_of(body)] - 1]

    with ScriptedServer(reply) as scripted:
        summary = run_distill(
            scripted.url, "a.jsonl", samples=5, limit=2, concurrency=1, price_in=1
        )
    for row in read(here / "a.jsonl"):
        assert (row["teacher"], row["teacher_rewards"]) == (["#a", "#c?"], [0.0, 0.0])
    figures = {"answered": 10, "offered": 4, "duplicates": 2, "truncated": 2, "empty": 2,
               "prompt_tokens": 50, "completion_tokens": 70, "cost": 50 / 1e6}  # fmt: skip
    assert {name: summary[name] for name in figures} == figures


def test_rate_limited_requests_are_retried(here):
    def reply(body, number):
        return (429, "slow down") if number % 3 == 0 else (200, f"#{number}")

    with ScriptedServer(reply) as scripted:
        summary = run_distill(scripted.url, "a.jsonl", samples=2, limit=6)
    assert (summary["answered"], summary["failed"]) == (12, 0)
    assert len(scripted.bodies) > 12


def test_failed_requests_are_sent_again_by_the_same_command(here, capsys):
    """Any number of failures of one problem leaves the other problems unaffected."""
    bad = json.loads((here / "rows.jsonl").read_text().splitlines()[3])["q"]
    broken = [True]

    def reply(body, number):
        fails = broken[0] and text_of(body) == bad
        return (400, "this one is too long") if fails else (200, f"#{number}")

    with ScriptedServer(reply) as scripted:
        command = ["distill", "r.yaml", "--teacher", scripted.url, "--out", "a.jsonl"]
        for expected in (120, 10):
            asked = len(scripted.bodies)
            assert main([*command, "--samples", "10"]) == 1
            assert len(scripted.bodies) - asked == expected
            assert "failed: 10 times: " in capsys.readouterr().out
            left = {row["q"] for row in read(here / "a.jsonl") if not row["teacher"]}
            assert left == {bad}
        broken[0] = False
        assert main([*command, "--samples", "10"]) == 0
        assert [text_of(body) for body in scripted.bodies[130:]] == [bad] * 10
    assert all(len(row["teacher"]) == 10 for row in read(here / "a.jsonl"))


def test_an_endpoint_that_rejects_all_requests_stops_the_command(here):
    reason = "no such thing as a temperature"
    with (
        ScriptedServer(lambda *_: (400, reason)) as scripted,
        pytest.raises(TeacherError, match=reason),
    ):
        run_distill(scripted.url, "a.jsonl", samples=10, concurrency=2)
    assert len(scripted.bodies) <= 8 + 2


def test_consecutive_failures_stop_the_command(here):
    def reply(body, number):
        # Only when four further requests are in flight has the command counted the five answers.
        if number >= 5:
            wait_until(lambda: len(scripted.bodies) >= 5 + 4)
        return (200, f"#{number}") if number < 5 else (500, "out of order")

    with ScriptedServer(reply) as scripted, pytest.raises(TeacherError, match="out of order"):
        run_distill(scripted.url, "a.jsonl", samples=100, concurrency=4)
    # Five answers, eight consecutive failures, three requests in flight.
    assert len(scripted.seeds()) <= 5 + 8 + 3
    assert not (here / "a.jsonl").exists()
    assert len(read(here / "a.distill/responses.jsonl")) == 5


def test_parameters_that_an_endpoint_rejects_are_not_sent_again(here):
    def reply(body, number):
        if "seed" in body:
            return 422, "extra fields not permitted: seed"
        if "max_tokens" in body:
            return 400, "Unsupported parameter: use 'max_completion_tokens' instead."
        return 200, f"#{number}"

    with ScriptedServer(reply) as scripted:
        summary = run_distill(
            scripted.url, "a.jsonl", samples=2, limit=6, concurrency=2, max_tokens=9
        )
    assert (summary["answered"], summary["failed"]) == (12, 0)
    assert scripted.answered[-1]["max_completion_tokens"] == 9
    assert len(scripted.bodies) <= 12 + 2 * 2


def test_the_key_of_an_openai_account_is_sent_to_openai_only(here, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "0123456789-of-an-account")
    monkeypatch.delenv(KEY, raising=False)
    with ScriptedServer(lambda body, number: (200, f"#{number}")) as scripted:
        run_distill(scripted.url, "a.jsonl", samples=1, limit=2)
        monkeypatch.setenv(KEY, TOKEN)
        run_distill(scripted.url, "b.jsonl", samples=1, limit=2)
    assert scripted.keys[2:] == [f"Bearer {TOKEN}"] * 2
    assert "0123456789-of-an-account" not in str(scripted.keys)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_distillation_can_be_continued(here, how, fork_server):
    """A kill loses the requests in flight, Ctrl-C loses nothing."""
    (here / "slow.py").write_text(
        "import time\ndef reward(completions, **_):\n"
        "    time.sleep(0.2)\n    return [0.0] * len(completions)\n"
    )
    signalled, pause = threading.Event(), [0.3]

    def reply(body, number):
        if 8 <= number < 12:
            signalled.wait()
        elif number >= 12:  # Sent until the process has received the signal.
            time.sleep(pause[0])
        return 200, f"#{number}"

    kept = here / "a.distill/responses.jsonl"

    def lines():
        return kept.read_bytes().count(b"\n") if kept.exists() else 0

    with ScriptedServer(reply) as scripted:
        process = fork_server.start(
            "distill", "r.yaml", "--teacher", scripted.url, "--out", "a.jsonl", "--samples", 20,
            "--concurrency", 4, "reward.functions=[slow:reward]",
        )  # fmt: skip
        while len(scripted.bodies) < 12 or lines() < 8:  # Eight answers, four requests in flight.
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        process.send_signal(how)
        if how == signal.SIGKILL:
            process.wait()
        signalled.set()
        process.wait()
        errors = process.stderr
        pause[0] = 0
        assert not (here / "a.jsonl").exists()
        before = len(scripted.bodies)
        assert before < 240
        if how == signal.SIGINT:
            assert process.returncode == 130, errors
            assert "the same command continues" in errors
            assert len(read(kept)) == before
        else:
            assert (before, lines()) == (12, 8)
            with kept.open("ab") as file:
                file.write(b'{"key": "half')
        summary = run_distill(scripted.url, "a.jsonl", samples=20, concurrency=8)
        assert (summary["answered"], summary["failed"]) == (240, 0)
        twice = sum(count - 1 for count in scripted.seeds().values())
        assert twice <= (0 if how == signal.SIGINT else 4)
        assert len(scripted.seeds()) == 240
    assert sum(len(row["teacher"]) for row in read(here / "a.jsonl")) == 240


def test_one_command_at_a_time(here):
    """A second command on the same file is an error and sends no request."""
    second = []

    def reply(body, number):
        if not second:
            second.append(None)
            with pytest.raises(UserError, match="must not be in use by another run"):
                run_distill(scripted.url, "a.jsonl", samples=1, limit=2)
            second[0] = len(scripted.bodies)
        return 200, f"#{number}"

    with ScriptedServer(reply) as scripted:
        run_distill(scripted.url, "a.jsonl", samples=1, limit=2, concurrency=1)
    assert second == [1]
    assert len(scripted.bodies) == 2
