"""A grading process and the messages to it.

Each process is a new interpreter: a fork would copy CUDA state and threads, and a `spawn` child
would import the user's script again. A message is its length as four big-endian bytes, then JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

START_SECONDS = 120.0
_HEADER = struct.Struct(">I")
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
#: -P: a file in the working directory must not shadow the standard library.
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); import gft_lite; sys.path.pop(0); "
    "from gft_lite.rewards.{module} import main; main()"
)


class Worker:
    """One process, which runs `main` of a module of this package; `setup` is its first message.

    `item`: the index of the item being graded, -1 while starting, None if idle.
    """

    def __init__(self, module: str, setup: bytes, *, one_thread: bool = False) -> None:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if one_thread else ()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM.format(module=module), _PACKAGE_ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | dict.fromkeys(names, "1"),
            start_new_session=True,  # Ctrl-C must only reach the parent
        )
        self.item: int | None = -1
        self.deadline = time.monotonic() + START_SECONDS
        self.send(setup)

    def send(self, payload: bytes) -> None:
        """Send a message; a broken pipe is handled at the next read."""
        assert self.process.stdin is not None
        try:
            send(self.process.stdin, payload)
        except BrokenPipeError:
            self.deadline = 0.0

    def receive(self) -> Any:
        """Read the reply; None if the process has died."""
        assert self.process.stdout is not None
        try:
            return json.loads(receive(self.process.stdout))
        except EOFError:
            return None

    def end(self, kill: bool = True) -> int:
        """Stop the process and close its pipes; the exit code, negative for a signal."""
        if kill and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # and what a user's function has started
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe:
                    pipe.close()
        try:
            return self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def send(pipe: IO[bytes], payload: bytes) -> None:
    """Write one message."""
    pipe.write(_HEADER.pack(len(payload)) + payload)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes:
    """Read one message.

    Raises: EOFError if the other process has closed the pipe.
    """
    header = pipe.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError
    payload = pipe.read(_HEADER.unpack(header)[0])
    if len(payload) < _HEADER.unpack(header)[0]:
        raise EOFError
    return payload
