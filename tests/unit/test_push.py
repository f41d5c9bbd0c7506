"""`gft-lite push` to an HTTP server with the hub's endpoints: what arrives, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from http_handler import JsonHandler

from gft_lite.cli import main
from gft_lite.tools.push import check_repository, files_to_push, local_base
from gft_lite.utils.errors import UserError

TOKEN = "hf_" + "a1" * 17
ADAPTER = {
    "adapter_model.safetensors": b"\0\1weights\xff" * 100,
    "adapter_config.json": b"{}",
    "README.md": b"---\nlibrary_name: peft\n---\n# mine\n",
    "tokenizer.json": b'{"a": 1}',
}
FIGURES = {"summary.json": b"{}", "metrics.jsonl": b'{"step": 1}\n', "eval/trained.json": b"{}"}


class Hub(ThreadingHTTPServer):
    """The endpoints by which huggingface_hub creates a repository and commits files to it."""

    def __init__(self, private: bool, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private, self.status = private, status
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.created: dict[str, object] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(JsonHandler):
    server: Hub

    def do_GET(self) -> None:
        self._send({"id": "me/mine", "private": self.server.private, "siblings": []})

    def do_PUT(self) -> None:
        self.server.objects[self.path.removeprefix("/put/")] = self._body()
        self._send({})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        assert "put" in self.path or self.headers["Authorization"] == f"Bearer {TOKEN}"
        if hub.status != 200:
            self._send({"error": "You don't have the rights"}, hub.status)
        elif self.path == "/api/repos/create":
            hub.created = json.loads(body)
            self._send({"url": f"{hub.url}/me/mine"})
        elif self.path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self._send({"files": modes})
        elif self.path.endswith("/objects/batch"):
            actions = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": actions})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            url = f"{hub.url}/me/mine/commit/1"
            self._send({"commitUrl": url, "commitOid": "1", "pullRequestUrl": None})
        else:
            self._send({"error": self.path}, 404)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def _send(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value))


@contextmanager
def hub(private: bool = True, status: int = 200):
    server = Hub(private, status)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a finished run that a push concerns."""
    folder = tmp_path / "mine"
    files = {f"adapter/{name}": content for name, content in ADAPTER.items()} | FIGURES
    files |= {"recipe.yaml": b"{}", "groups/step-000001.jsonl": b"private", "adapter/a.tmp": b"x"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def push(run: Path, endpoint: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as huggingface_hub reads the variables once."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    command = [sys.executable, "-m", "gft_lite", "push", str(run), "me/mine", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_what_arrives_is_what_is_in_the_folder(run):
    with hub() as server:
        done = push(run, server.url, "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded: {server.url}/me/mine"
    assert TOKEN not in done.stdout + done.stderr
    assert server.created["visibility"] == "private"
    assert server.files == ADAPTER | {f"run/{name}": text for name, text in FIGURES.items()}


@pytest.mark.parametrize(
    ("hub_is", "code", "error"),
    [
        ({"private": False}, 2, "--private: must be given for a private repository, got me/mine"),
        ({"status": 403}, 2, "REPO: must be a repository that the token may write to, got 'me/mi"),
        ({"status": 422}, 1, "PushError: the hub answered 422 (You don't have the rights)."),
    ],
    ids=["public", "no rights", "failure"],
)
def test_what_the_hub_rejects_is_one_line(run, hub_is, code, error):
    with hub(**hub_is) as server:
        done = push(run, server.url, "--private")
    assert (done.returncode, server.files) == (code, {})
    assert done.stderr.startswith(error)
    assert TOKEN not in done.stdout + done.stderr


def test_a_dry_run_needs_no_token_and_no_network(run, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["push", str(run), "me/mine", "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1,000", "adapter_model.safetensors"] in lines
    assert lines[-1] == ["1,060", "7", "files"]


def test_a_base_that_others_lack_is_noted(run, capsys):
    config = {"base_model_name_or_path": "/models/mine"}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["push", str(run), "me/mine", "--dry-run"]) == 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert note.startswith("note: adapter_config.json names the base /models/mine, a folder that")


def test_without_a_token_it_stops_in_one_line(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("gft_lite.tools.push.get_token", lambda: None)
    assert main(["push", str(run), "me/mine"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("HF_TOKEN: must be set to upload, got no token.")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["me//mine", "a/b/c", "me/mi ne", "me/x--y", "-x", "me/x.git"])
def test_a_wrong_name_is_one_line(name, run, capsys):
    assert main(["push", str(run), "me/x--y", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="REPO: must be a name on the hub"):
        check_repository(name)


def test_a_folder_of_an_adapter_or_a_model_is_pushed_as_it_is(run, tmp_path):
    assert set(files_to_push(run / "adapter")) == set(ADAPTER)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert set(files_to_push(run, model=tmp_path)) == {
        "model.safetensors", *(f"run/{name}" for name in FIGURES)
    }  # fmt: skip
    with pytest.raises(UserError, match="RUN: must be a finished run"):
        files_to_push(run / "groups")


def test_a_file_with_a_secret_is_not_pushed(run):
    (run / "metrics.jsonl").write_text(json.dumps({"url": TOKEN}))
    with pytest.raises(UserError, match=r"metrics.jsonl: must not contain a token") as error:
        files_to_push(run)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    ("config", "found"),
    [('{"base_model_name_or_path": "/models/mine"}', "/models/mine"),
     ('{"base_model_name_or_path": "someone/model"}', None), ("{}", None), (None, None)],
)  # fmt: skip
def test_a_base_of_this_machine_is_found(config, found, tmp_path):
    file = tmp_path / "adapter_config.json"
    file.write_text(config or "")
    assert local_base({} if config is None else {file.name: file}) == found
