"""Grading processes that can be killed: each grades one item at a time, so a hang costs one item.

The pools of the standard library cannot kill one item.
"""

from __future__ import annotations

import json
import selectors
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from gft_lite.rewards.base import Grade, RewardError
from gft_lite.rewards.worker import START_SECONDS, Worker
from gft_lite.rewards.worker_process import WALL_FACTOR
from gft_lite.utils.progress import report_progress

_MAX_FAILED_STARTS = 3
# The exit codes of a worker whose own timers ended it: of CPU time, and of wall time where this
# process could not.
_OUT_OF_TIME = [-getattr(signal, name, 0) or None for name in ("SIGPROF", "SIGALRM")]


class WorkerPool:
    """Processes that grade items under a time limit per item; started at the first use.

    `timeout` is in CPU seconds (on the wall clock, at most WALL_FACTOR times that). `functions`
    are (name, parameters) pairs of built-in rules; an item is the JSON of [index into
    `functions`, text, answer, answer_type]. Thread-safe.
    """

    def __init__(
        self, functions: Sequence[tuple[str, dict[str, Any]]], *, workers: int, timeout: float
    ) -> None:
        self._setup = json.dumps({"functions": functions, "timeout": timeout}).encode()
        self._size = workers
        self._timeout = timeout
        self._workers: list[Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.process.pid for worker in self._workers]

    def run(self, items: Sequence[bytes]) -> list[Grade]:
        """Grade every item, in order; verdict "timeout" if it hung, "error" if the process died.

        Raises: RewardError if workers cannot start.
        """
        grades = [Grade(0.0, "error")] * len(items)
        pending = deque(range(len(items)))
        with self._lock:
            try:
                self._workers = [w for w in self._workers if self._alive(w)]
                while pending or any(w.item is not None and w.item >= 0 for w in self._workers):
                    self._assign(items, pending)
                    for worker, replied in self._wait():
                        self._collect(worker, replied, grades)
                    busy = sum(w.item is not None and w.item >= 0 for w in self._workers)
                    graded = len(items) - len(pending) - busy
                    report_progress(graded, len(items), "responses graded")
            except BaseException:
                self._stop()  # a pending reply must not be read as one of the next batch
                raise
        return grades

    def close(self) -> None:
        """Stop the workers; a later `run` starts new ones."""
        with self._lock:
            self._stop(kill=False)

    def _assign(self, items: Sequence[bytes], pending: deque[int]) -> None:
        working = sum(worker.item is not None and worker.item >= 0 for worker in self._workers)
        while len(self._workers) < min(self._size, working + len(pending)):
            self._workers.append(Worker("worker_process", self._setup, one_thread=True))
        for worker in self._workers:
            if worker.item is None and pending:
                worker.item = pending.popleft()
                worker.deadline = time.monotonic() + WALL_FACTOR * self._timeout
                worker.send(items[worker.item])

    def _wait(self) -> list[tuple[Worker, bool]]:
        """Workers that have replied or died (True), or have exceeded their time limit (False)."""
        busy = [worker for worker in self._workers if worker.item is not None]
        timeout = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            replied = [key.data for key, _ in selector.select(timeout)]
        now = time.monotonic()
        expired = [w for w in busy if w.deadline <= now and w not in replied]
        return [(w, True) for w in replied] + [(w, False) for w in expired]

    def _collect(self, worker: Worker, replied: bool, grades: list[Grade]) -> None:
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
                timed_out = not replied or code in _OUT_OF_TIME
                grades[item] = Grade(0.0, "timeout" if timed_out else "error")

    def _collect_start(self, worker: Worker, reply: Any) -> None:
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

    def _alive(self, worker: Worker) -> bool:
        if worker.process.poll() is None:
            return True
        worker.end()
        return False

    def _stop(self, kill: bool = True) -> None:
        for worker in self._workers:
            worker.end(kill)
        self._workers = []
