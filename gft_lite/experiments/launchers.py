"""Launchers of sweep trials: local processes and Ray tasks, in the table `LAUNCHERS`.

Adding a launcher:
1. Write a class with the methods of `Launcher`; its constructor takes `jobs`, and
   `share`: whether trials may share a loaded base and an engine.
2. Name it in `LAUNCHERS`; `sweep --launcher NAME` then accepts it.
"""

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
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gft_lite.recipe.schema import Recipe
from gft_lite.rewards.base import RewardError
from gft_lite.utils.cpu import default_threads
from gft_lite.utils.errors import UserError
from gft_lite.utils.secrets import redact

if TYPE_CHECKING:
    from gft_lite.training.shared_parts import SharedParts

LOG = "log.txt"  # Of each trial, in its folder.
SEPARATE = "--separate"  # Argument of a child process.


class Launcher(Protocol):
    """Runs up to `jobs` trials at the same time; the folder of each holds a recipe."""

    jobs: int

    def start(self, folder: Path) -> None:
        """Start a trial."""

    def wait(self, seconds: float) -> list[tuple[Path, str | None]]:
        """Wait up to `seconds` for a trial to end; returns the ended ones and their failures."""

    def interrupt(self, folder: Path) -> None:
        """Interrupt a trial, which ends after its current step."""

    def stop(self) -> None:
        """Interrupt all trials."""

    def close(self) -> None:
        """End all processes."""


def run_trial(folder: Path, share: bool = False) -> str | None:
    """Train the run of a folder to its end; returns the error as text if training failed.

    With `share`, the trials of this process share base and engine.
    """
    with _redirect_output(folder / LOG), _exit_on_sigint():
        try:
            from rich.console import Console

            from gft_lite.training.run import train

            _free_memory()
            train(Recipe.load(folder / "recipe.yaml"), folder, resume=True,
                  console=Console(stderr=True, width=100),
                  shared=_shared_parts() if share else None)  # fmt: skip
        except KeyboardInterrupt:
            return "interrupted"
        except Exception as error:  # The other trials go on after any error.
            print(redact(traceback.format_exc()), file=sys.stderr)
            is_expected = isinstance(error, UserError | RewardError)
            return redact(str(error) if is_expected else f"{type(error).__name__}: {error}")
    return None


@cache
def _shared_parts() -> SharedParts:
    """What the trials of this process share."""
    from gft_lite.training.shared_parts import SharedParts

    return SharedParts()


def _free_memory() -> None:
    """Release the memory of the previous trial before a model is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _exit_on_sigint() -> Iterator[None]:
    """End the process on SIGINT; during a step, training installs its own handler.

    Imports that catch all exceptions would swallow a KeyboardInterrupt.
    """
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _redirect_output(file: Path) -> Iterator[None]:
    """Redirect stdout and stderr to a file, also for output of compiled code."""
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
    """Child processes that are reused by later trials, so that imports happen once.

    With `share`, the trials of a process share its base and its engine (`SharedParts`). The process
    of a failed trial is ended, so that its memory is released.
    """

    def __init__(self, jobs: int | None, share: bool = True) -> None:
        self.jobs = jobs or 1
        self._loaded: dict[int, dict[str, Any]] = {}  # What the last trial of a process loaded.
        self._arguments = [] if share else [SEPARATE]
        self._idle: list[subprocess.Popen[str]] = []
        self._busy: dict[Path, subprocess.Popen[str]] = {}
        self._interrupted: set[int] = set()  # Their processes are not used again.

    def start(self, folder: Path) -> None:
        """Start a trial."""
        self._idle = [process for process in self._idle if process.poll() is None]
        inputs = Recipe.load(folder / "recipe.yaml").policy.loading_inputs
        fitting = [p for p in self._idle if self._loaded[p.pid] == inputs]
        process = (fitting or self._idle or [self._new_process()])[-1]
        self._idle = [other for other in self._idle if other is not process]
        self._loaded[process.pid] = inputs
        assert process.stdin is not None
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        self._busy[folder] = process

    def wait(self, seconds: float) -> list[tuple[Path, str | None]]:
        """Wait up to `seconds` for a trial to end; returns the ended ones and their failures."""
        pipes: dict[Any, Path] = {p.stdout: folder for folder, p in self._busy.items()}
        folders = [pipes[pipe] for pipe in connection.wait(list(pipes), seconds)]
        return [(folder, self._result(self._busy.pop(folder))) for folder in folders]

    def interrupt(self, folder: Path) -> None:
        """Interrupt a trial, which ends after its current step."""
        process = self._busy[folder]
        self._interrupted.add(process.pid)
        process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """Interrupt all trials."""
        for folder in self._busy:
            self.interrupt(folder)

    def close(self) -> None:
        """End all processes."""
        for process in [*self._idle, *self._busy.values()]:
            _kill(process)

    def _new_process(self) -> subprocess.Popen[str]:
        threads = str(max(1, default_threads() // self.jobs))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",  # The name of a folder may not be valid UTF-8.
            env={
                "OMP_NUM_THREADS": threads,
                **os.environ,
                "PYTHONIOENCODING": "utf-8:surrogateescape",  # In every locale.
            },
            start_new_session=True,  # The parent handles Ctrl-C.
        )

    def _result(self, process: subprocess.Popen[str]) -> str | None:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        reason = json.loads(line) if line else _exit_reason(process)
        if reason is None and process.pid not in self._interrupted:
            self._idle.append(process)
        else:
            _kill(process)
        return reason


def _exit_reason(process: subprocess.Popen[str]) -> str:
    code = process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", possibly because memory ran out" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{hint}"
    assert process.stderr is not None
    last_line = process.stderr.read().strip().splitlines()[-1:]
    return ": ".join([f"its process ended with exit code {code}", *last_line])


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def main() -> None:
    """The child process of LocalLauncher: reads folders and writes failures, one per line."""
    share = SEPARATE not in sys.argv
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    folders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_folders, args=(folders,), daemon=True).start()
    while True:
        print(json.dumps(run_trial(Path(folders.get()), share)), file=replies, flush=True)


def _read_folders(folders: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        folders.put(line.rstrip("\n"))
    os._exit(1)  # The sweep has ended; a restarted sweep may use the same folders.


# --- Ray -------------------------------------------------------------------------------------


class RayLauncher:
    """Tasks of the Ray cluster at RAY_ADDRESS, by default of a new local Ray.

    All machines must have the sweep's folder under the same path and gft-lite installed. If the
    cluster has GPUs, every trial gets one. `share` is not used: the idle process of one trial would
    hold memory of a GPU that Ray gives to another.
    """

    def __init__(self, jobs: int | None, share: bool = False) -> None:
        address = os.environ.get("RAY_ADDRESS", "local")
        try:
            self._ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            advice = 'pip install "gft-lite[ray]", or use --launcher local.'
            rule = "--launcher: ray must be installed, got no such module"
            raise UserError([f"{rule}. {advice}"]) from error
        ray = self._ray
        size = {"num_cpus": jobs} if address == "local" else {}
        if address == "local":
            # Ray listens on all interfaces and runs any code it receives unless it has a token.
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray._raylet.Config.initialize("")  # Reads the environment again.
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **size)
        except Exception as error:  # Ray itself raises this type when a machine does not start.
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            rule = "--launcher: ray must start, or be reached at RAY_ADDRESS"
            advice = "Start the command again, or use --launcher local."
            raise UserError([f"{rule}, got {reason}. {advice}"]) from error
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.jobs = jobs or gpus or int(resources.get("CPU", 1))
        self._task = ray.remote(num_cpus=1, num_gpus=min(gpus, 1), max_retries=0)(_ray_trial)
        self._busy: dict[Any, Path] = {}

    def start(self, folder: Path) -> None:
        """Start a trial."""
        self._busy[self._task.remote(str(folder), os.getcwd())] = folder

    def wait(self, seconds: float) -> list[tuple[Path, str | None]]:
        """Wait up to `seconds` for a trial to end; returns the ended ones and their failures."""
        ready, _ = self._ray.wait(list(self._busy), timeout=seconds)
        return [(self._busy.pop(reference), self._result(reference)) for reference in ready]

    def interrupt(self, folder: Path) -> None:
        """Interrupt a trial, which ends after its current step."""
        self._ray.cancel(next(task for task, busy in self._busy.items() if busy == folder))

    def stop(self) -> None:
        """Interrupt all trials."""
        for folder in self._busy.values():
            self.interrupt(folder)

    def close(self) -> None:
        """End all processes."""
        for reference in self._busy:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    def _result(self, reference: Any) -> str | None:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {error}"


def _ray_trial(folder: str, directory: str) -> str | None:
    os.chdir(directory)  # Recipes may have paths relative to it.
    return run_trial(Path(folder))


LAUNCHERS: dict[str, type[LocalLauncher] | type[RayLauncher]] = {
    "local": LocalLauncher,
    "ray": RayLauncher,
}


if __name__ == "__main__":
    main()
