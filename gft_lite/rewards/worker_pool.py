"""Killable grading processes: one item at a time each, so a hang costs one item and no other.

They are fresh interpreters, neither forks of a parent with CUDA and threads nor `spawn` children
that import the user's script again; a pool could not kill the one item that hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gft_lite.rewards.base import Grade, RewardError
from gft_lite.rewards.worker_process import WALL_FACTOR, receive, send

START_SECONDS = 120.0
_MAX_FAILED_STARTS = 3
_OUT_OF_CPU_TIME = -getattr(signal, "SIGPROF", 0) or None
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
#: -P keeps the user's directory from shadowing the standard library; the package is this one.
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); import gft_lite; sys.path.pop(0); "
    "from gft_lite.rewards.worker_process import main; main()"
)


class _Worker:
    """One process and what it is doing: starting (item -1), grading an item, or idle (None)."""

    def __init__(self, setup: bytes) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, _PACKAGE_ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads,
            start_new_session=True,  # Ctrl-C is the parent's business
        )
        self.item: int | None = -1
        self.deadline = time.monotonic() + START_SECONDS
        self.send(setup)

    def send(self, payload: bytes) -> None:
        """Hand over a message; a worker found dead here is noticed when it is read."""
        assert self.process.stdin is not None
        try:
            send(self.process.stdin, payload)
        except BrokenPipeError:
            self.deadline = 0.0

    def receive(self) -> Any:
        """The reply, or None if the process has died."""
        assert self.process.stdout is not None
        try:
            return json.loads(receive(self.process.stdout))
        except EOFError:
            return None

    def end(self, kill: bool = True) -> int:
        """Stop the process and free its pipes; the exit code, negative for a signal."""
        if kill:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe:
                    pipe.close()
        try:
            return self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class WorkerPool:
    """N processes that grade items under a time limit each; started at the first use.

    `timeout` is CPU seconds of the worker (WALL_FACTOR times that on the wall clock at most).
    `functions` are (name, parameters) pairs of built-in rules; an item is the JSON of
    [index into functions, text, answer, answer_type]. Safe to call from any thread.
    """

    def __init__(
        self, functions: Sequence[tuple[str, dict[str, Any]]], *, workers: int, timeout: float
    ) -> None:
        self._setup = json.dumps({"functions": functions, "timeout": timeout}).encode()
        self._size = workers
        self._timeout = timeout
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers alive now."""
        return [worker.process.pid for worker in self._workers]

    def run(self, items: Sequence[bytes]) -> list[Grade]:
        """Grade every item, in order; a hung item is "timeout", a crashed one "error".

        Raises: RewardError if workers cannot start.
        """
        grades = [Grade(0.0, "error")] * len(items)
        waiting = deque(range(len(items)))
        with self._lock:
            try:
                self._workers = [w for w in self._workers if self._alive(w)]
                while waiting or any(w.item is not None and w.item >= 0 for w in self._workers):
                    self._hand_out(items, waiting)
                    for worker, replied in self._wait():
                        self._collect(worker, replied, grades)
            except BaseException:
                self._stop()  # a reply in flight must not answer the next batch
                raise
        return grades

    def close(self) -> None:
        """Stop the workers; a later `run` starts new ones."""
        with self._lock:
            self._stop(kill=False)

    def _hand_out(self, items: Sequence[bytes], waiting: deque[int]) -> None:
        working = sum(worker.item is not None and worker.item >= 0 for worker in self._workers)
        while len(self._workers) < min(self._size, working + len(waiting)):
            self._workers.append(_Worker(self._setup))
        for worker in self._workers:
            if worker.item is None and waiting:
                worker.item = waiting.popleft()
                worker.deadline = time.monotonic() + WALL_FACTOR * self._timeout
                worker.send(items[worker.item])

    def _wait(self) -> list[tuple[_Worker, bool]]:
        """The workers to attend to: (worker, True) has replied or died, (worker, False) is late."""
        busy = [worker for worker in self._workers if worker.item is not None]
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            replied = [key.data for key, _ in selector.select(patience)]
        now = time.monotonic()
        late = [w for w in busy if w.deadline <= now and w not in replied]
        return [(w, True) for w in replied] + [(w, False) for w in late]

    def _collect(self, worker: _Worker, replied: bool, grades: list[Grade]) -> None:
        item = worker.item
        assert item is not None
        reply = worker.receive() if replied else None
        if item < 0:
            self._collect_start(worker, reply)
        elif reply is not None:
            grades[item] = Grade(*reply)
        worker.item = None
        if reply is None:
            self._workers.remove(worker)
            code = worker.end(kill=not replied)
            if item >= 0:
                late = not replied or code == _OUT_OF_CPU_TIME
                grades[item] = Grade(0.0, "timeout" if late else "error")

    def _collect_start(self, worker: _Worker, reply: Any) -> None:
        if reply is not None and "error" in reply:
            raise RewardError(f"reward workers: must start, got {reply['error']}.")
        if reply is not None:
            self._failed_starts = 0
            return
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise RewardError(
                f"reward workers: must start within {START_SECONDS:.0f} s, got "
                f"{self._failed_starts} failures in a row. Read the messages above this one."
            )

    def _alive(self, worker: _Worker) -> bool:
        if worker.process.poll() is None:
            return True
        worker.end()
        return False

    def _stop(self, kill: bool = True) -> None:
        for worker in self._workers:
            worker.end(kill)
        self._workers = []
