"""Who runs a sweep's trials: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import gc
import importlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from gft_lite.recipe.schema import Recipe
from gft_lite.rewards.base import RewardError
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.secrets import redact

LOG = "log.txt"


class Launcher(Protocol):
    """Runs up to `jobs` trials at the same time, each the begun run of a folder."""

    jobs: int

    def start(self, folder: Path) -> None:
        """Begin a trial."""

    def ended(self, seconds: float) -> list[tuple[Path, str | None]]:
        """The trials that ended, after waiting so long for one, and why they failed if they did."""

    def stop(self) -> None:
        """Ask all trials to end after the step they are at."""

    def close(self) -> None:
        """End whatever still runs."""


def run_trial(folder: Path) -> str | None:
    """Train a begun run to its end and return why that failed, if it did."""
    with _output_to(folder / LOG), _ended_by_sigint():
        try:
            from rich.console import Console

            from gft_lite.training.run import train

            _make_room()
            train(Recipe.load(folder / "recipe.yaml"), folder, resume=True,
                  console=Console(stderr=True, width=100))  # fmt: skip
        except KeyboardInterrupt:
            return "interrupted"
        except Exception as error:  # Whatever it is, the other trials go on.
            print(redact(traceback.format_exc()), file=sys.stderr)
            told = isinstance(error, RecipeError | RewardError)
            return redact(str(error) if told else f"{type(error).__name__}: {error}")
    return None


def _make_room() -> None:
    """Give back what the trial before held, before this one loads its model."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _ended_by_sigint() -> Iterator[None]:
    """End the process at SIGINT, except within a step, where training has its own way.

    Imports that catch everything would swallow a KeyboardInterrupt.
    """
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Send all that this process writes to a file, what compiled code writes too."""
    kept = os.dup(1), os.dup(2)
    with file.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


# --- processes -------------------------------------------------------------------------------


class LocalLauncher:
    """Fresh interpreters, kept for one trial after the other: their imports are paid for once.

    A trial that fails takes its process with it, and whatever it left in memory.
    """

    def __init__(self, jobs: int | None) -> None:
        self.jobs = jobs or 1
        self._idle: list[subprocess.Popen[str]] = []
        self._busy: dict[Path, subprocess.Popen[str]] = {}

    def start(self, folder: Path) -> None:
        """Begin a trial."""
        self._idle = [process for process in self._idle if process.poll() is None]
        process = self._idle.pop() if self._idle else self._new_process()
        assert process.stdin is not None
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        self._busy[folder] = process

    def ended(self, seconds: float) -> list[tuple[Path, str | None]]:
        """The trials that ended, and why they failed if they did."""
        pipes: dict[Any, Path] = {p.stdout: folder for folder, p in self._busy.items()}
        folders = [pipes[pipe] for pipe in wait(list(pipes), seconds)]
        return [(folder, self._result(self._busy.pop(folder))) for folder in folders]

    def stop(self) -> None:
        """Ask all trials to end after the step they are at."""
        for process in self._busy.values():
            process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End whatever still runs."""
        for process in [*self._idle, *self._busy.values()]:
            _kill(process)

    def _new_process(self) -> subprocess.Popen[str]:
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",  # A folder's name need not be valid text.
            env={
                "OMP_NUM_THREADS": threads,
                **os.environ,
                "PYTHONIOENCODING": "utf-8:surrogateescape",  # Whatever the locale is.
            },
            start_new_session=True,  # The parent handles Ctrl-C.
        )

    def _result(self, process: subprocess.Popen[str]) -> str | None:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        reason = json.loads(line) if line else _cause_of_death(process)
        if reason is None:
            self._idle.append(process)
        else:
            _kill(process)
        return reason


def _cause_of_death(process: subprocess.Popen[str]) -> str:
    code = process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was killed by {name}" + (
            ", perhaps for want of memory" if name == "SIGKILL" else ""
        )
    assert process.stderr is not None
    said = process.stderr.read().strip().splitlines()[-1:]
    return ": ".join([f"its process ended with exit code {code}", *said])


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def main() -> None:
    """A process of the LocalLauncher: folders in, reasons of failure out, one a line."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    folders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(folders,), daemon=True).start()
    while True:
        print(json.dumps(run_trial(Path(folders.get()))), file=replies, flush=True)


def _listen(folders: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        folders.put(line.rstrip("\n"))
    os._exit(1)  # The sweep is gone; going on would spoil what its successor does.


# --- Ray -------------------------------------------------------------------------------------


class RayLauncher:
    """Tasks of the Ray cluster at RAY_ADDRESS, or of a Ray that is started on this machine.

    All machines must see the sweep's folder under the same path and have gft-lite installed.
    Where the cluster has GPUs, every trial gets one.
    """

    def __init__(self, jobs: int | None) -> None:
        address = os.environ.get("RAY_ADDRESS", "local")
        try:
            self._ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            advice = 'pip install "gft-lite[ray]", or use --launcher local.'
            raise RecipeError([f"--launcher: ray is not installed. {advice}"]) from error
        ray = self._ray
        size = {"num_cpus": jobs} if address == "local" else {}
        if address == "local":
            # Ray listens on every network, and runs what anybody sends it unless it has a token.
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray._raylet.Config.initialize("")  # It has read the environment before.
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **size)
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        self.jobs = jobs or gpus or int(there.get("CPU", 1))
        self._task = ray.remote(num_cpus=1, num_gpus=min(gpus, 1), max_retries=0)(_ray_trial)
        self._busy: dict[Any, Path] = {}

    def start(self, folder: Path) -> None:
        """Begin a trial."""
        self._busy[self._task.remote(str(folder), os.getcwd())] = folder

    def ended(self, seconds: float) -> list[tuple[Path, str | None]]:
        """The trials that ended, and why they failed if they did."""
        ready, _ = self._ray.wait(list(self._busy), timeout=seconds)
        return [(self._busy.pop(reference), self._result(reference)) for reference in ready]

    def stop(self) -> None:
        """Ask all trials to end after the step they are at."""
        for reference in self._busy:
            self._ray.cancel(reference)

    def close(self) -> None:
        """End whatever still runs."""
        for reference in self._busy:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    def _result(self, reference: Any) -> str | None:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {error}"


def _ray_trial(folder: str, directory: str) -> str | None:
    os.chdir(directory)  # Paths in recipes are seen from there.
    return run_trial(Path(folder))


LAUNCHERS: dict[str, type[LocalLauncher] | type[RayLauncher]] = {
    "local": LocalLauncher,
    "ray": RayLauncher,
}


if __name__ == "__main__":
    main()
