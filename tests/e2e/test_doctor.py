"""`gft-lite doctor` on a working and on a broken installation, and each check alone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from importlib.util import find_spec

import pytest
from huggingface_hub import constants

from gft_lite.tools import doctor
from gft_lite.tools.doctor import Check


def run_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gft_lite", "doctor"], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


def lines_of(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """State and text of each check in the table, by name."""
    rows = (re.match(r"(\S.*?) +(ok|warn|fail) +(.*)", line) for line in done.stdout.splitlines())
    return {row[1]: (row[2], row[3]) for row in rows if row}


def test_a_working_installation_passes_a_training_step_and_a_hot_load():
    done = run_doctor()
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("everything that training needs works")
    found = lines_of(done)
    for name in ("python", "torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        assert found[name][0] == "ok"
    assert found["torch"][1].split() == [metadata.version("torch")]
    assert found["hub"][0] == "warn" and "HF_HUB_OFFLINE is set" in found["hub"][1]
    state, step = found["4-bit step"]
    before, after = (float(step.split()[i]) for i in (5, 7))
    assert state == "ok" and before < after < 0
    engine = "vllm" if find_spec("vllm") else "transformers"
    assert found[f"hot-load: {engine}"][0] == "ok"
    assert "new adapter served" in found[f"hot-load: {engine}"][1]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_broken_package_is_named_with_exit_code_1(tmp_path):
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('libcudart.so is missing')")
    done = run_doctor(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    state, rest = lines_of(done)["training"]
    assert state == "fail" and "libcudart.so is missing" in rest
    assert done.stdout.rstrip().endswith("see what failed above")
    assert "Traceback" not in done.stdout + done.stderr


def checks(name: str) -> dict[str, Check]:
    return {check.name: check for check in doctor.CHECKS[name]()}


def test_versions_are_compared_with_the_package_metadata(tmp_path, monkeypatch):
    for name, version in (("rich", "1.0"), ("unsloth", "1.2")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    assert checks("versions")["rich"] == Check("rich", "ok", metadata.version("rich"))
    monkeypatch.syspath_prepend(tmp_path)
    found = checks("versions")
    assert found["rich"] == Check(
        "rich", "fail", "1.0, tested with >=14.1", "pip install 'rich>=14.1'"
    )
    assert found["unsloth"].state == "fail"
    assert found["torch"].state == "ok"  # 2.13.0+cpu is 2.13.0 as well.


def test_a_missing_extra_is_a_warning_with_its_name():
    if find_spec("unsloth"):
        pytest.skip("unsloth is installed")
    assert checks("versions")["unsloth"] == Check(
        "unsloth", "warn", "not installed", "If you want it: pip install 'gft-lite[unsloth]'."
    )


@pytest.mark.parametrize(("amount", "state"), [(1, "fail"), (2, "warn"), (7, "warn"), (8, "ok")])
def test_amounts_fail_warn_or_pass(amount, state):
    check = doctor._check_amount(
        "memory", amount << 30, 2 << 30, 8 << 30, "free", "Close something."
    )
    advice = "" if state == "ok" else "Close something."
    assert check == Check("memory", state, f"{amount}.0 GiB free", advice)


def test_disk_space_of_a_folder_that_does_not_exist_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    found = checks("disk")
    assert found["disk: runs"].found.endswith(f"GiB free at {tmp_path}")
    assert found["disk: hub"].found.endswith(f"GiB free at {tmp_path}/not/yet")


class _Answer(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[int]:
    """The port of a local web server."""
    web = HTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    yield web.server_port
    web.shutdown()


class TestHub:
    @pytest.fixture(autouse=True)
    def _online(self, monkeypatch, tmp_path):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr(doctor, "HUB_SECONDS", 60)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)

    def test_access_without_showing_a_secret(self, server, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://me:password@127.0.0.1:{server}")
        assert checks("hub")["hub"] == Check(
            "hub", "ok", "127.0.0.1 answers; no token, which gated models such as Llama need"
        )
        monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
        assert checks("hub")["hub"].found == "127.0.0.1 answers; a token is set"

    def test_no_answer_is_a_warning(self, monkeypatch):
        monkeypatch.setattr(doctor, "HUB_SECONDS", 0.5)
        with socket.socket() as silent:  # Accepts connections, never answers.
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            for port, why in ((silent.getsockname()[1], "ReadTimeout"), (1, "ConnectError")):
                monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
                check = checks("hub")["hub"]
                assert check.state == "warn"
                assert check.found == f"no answer from 127.0.0.1 ({why})"


def test_other_checks_run_after_one_that_raises(monkeypatch):
    def broken() -> Iterator[Check]:
        yield Check("first", "ok", "1")
        raise OSError("no such device\nmore")

    started: list[str] = []
    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken, "memory": doctor.memory})
    first, failed, last = doctor.run_checks(started.append)
    assert started == ["broken", "memory"]
    assert (first, last.name) == (Check("first", "ok", "1"), "memory")
    assert (failed.name, failed.state) == ("broken", "fail")
    assert failed.found == "OSError: no such device"
    assert not doctor.all_required_pass([first, failed])
    assert doctor.all_required_pass([first, Check("x", "warn", "")])
