"""The command line in forks of a process that has imported the large libraries once.

A fork behaves as a new process, with signals, exit codes, environment and output of its own, and
saves the seconds that the imports take. `forked.py MODULE...` is that process.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch._dynamo",
    "gft_lite.evaluation.sets",
    "gft_lite.policy.qlora",
    "gft_lite.rollout.transformers_engine",
    "gft_lite.training.run",
    "transformers.models.qwen2.modeling_qwen2",
)
VLLM = ("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine")
STARTED_WITH = set(os.environ)


class ForkedProcess:
    """A command in a fork, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, server: ForkServer, number: int, output: Path) -> None:
        self._server = server
        self.pid = number
        self.returncode: int | None = None
        self._output = output

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.call(poll=self.pid)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._output.with_suffix(".out").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._output.with_suffix(".err").read_text(encoding="utf-8")


class ForkServer:
    """A process that has imported `modules` and starts commands in forks of itself."""

    def __init__(self, folder: Path, modules: Sequence[str]) -> None:
        self._folder = folder
        self._started = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def call(self, **request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        *arguments: object,
        code: str | None = None,
        env: dict[str, str] | None = None,
        signal_after: tuple[str, int, int] | None = None,
    ) -> ForkedProcess:
        """Start `python -m gft_lite ARGUMENTS` or `python -c CODE ARGUMENTS` in this folder.

        `signal_after`: a function, the number of a call, and the signal that the process sends to
        itself after that call. A signal from outside comes sooner or later, by the load.
        """
        self._started += 1
        output = self._folder / f"{self._started}.txt"
        number = self.call(
            arguments=list(map(str, arguments)), code=code, cwd=str(Path.cwd()),
            env=dict(os.environ if env is None else env), output=str(output),
            signal_after=signal_after,
        )  # fmt: skip
        return ForkedProcess(self, number, output)

    def run(self, *arguments: object, **options: Any) -> ForkedProcess:
        """Start a command or code and wait for its end."""
        process = self.start(*arguments, **options)
        process.wait()
        return process

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _fork(
    arguments: list[str],
    cwd: str,
    env: dict[str, str],
    output: str,
    code: str | None,
    signal_after: tuple[str, int, int] | None,
) -> int:
    sys.stdout.flush()
    if number := os.fork():
        return number
    os.chdir(cwd)
    for name in STARTED_WITH - set(env):  # Others were set by an import.
        os.environ.pop(name, None)
    os.environ.update(env)
    sys.path[0] = cwd  # As of `python -m`.
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(Path(output).with_suffix(suffix), os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    # A background shell starts its commands with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        if signal_after:
            _signal_after(*signal_after)
        status = _work(arguments, code)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _signal_after(function: str, call: int, number: int) -> None:
    """Replace a function, as `gft_lite.module:Class.method`, by one that sends the signal."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def replacement(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, replacement)


def _work(arguments: list[str], code: str | None) -> int:
    from gft_lite.cli import main

    if code is None:
        return main(arguments)
    sys.argv = ["-c", *arguments]
    try:
        exec(code, {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _poll(number: int) -> int | None:
    found, status = os.waitpid(number, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def serve(modules: Sequence[str]) -> None:
    """Import the modules and answer requests on stdin: to start a command, or for its exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever an import prints is no answer.
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _poll(request["poll"]) if "poll" in request else _fork(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
