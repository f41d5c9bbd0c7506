"""Parts of a check, each in a process of its own, under one budget of time.

What a part breaks (a CUDA error poisons its whole process) or leaves behind, the next one never
sees; and all that it noted until then is on the disk. The processes are forked from a server that
has read torch and the models but has never touched CUDA.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
LONGEST_ERROR = 1500  # characters
LINGER = 5  # seconds
# None of them initialises CUDA when it is imported, unlike peft and bitsandbytes.
PRELOAD = (
    "torch", "numpy", "safetensors.torch", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip


class Skip(Exception):
    """The part has no place here, and why."""


@dataclass(frozen=True)
class Part:
    """Where its function is ("module:name"), and the most minutes that it may take."""

    path: str
    minutes: float


class Notes:
    """Sends each figure home as soon as there is one."""

    def __init__(self, home: Connection) -> None:
        self._home = home

    def add(self, name: str, figures: Figures) -> None:
        """Note a case's figures."""
        self._home.send((name, figures))

    def case(self, name: str, function: Callable[..., Figures], *arguments: Any) -> Figures | None:
        """Note what the function found, or how it failed: the next case may still go well."""
        start = time.perf_counter()
        try:
            figures = function(*arguments)
        except Skip as reason:
            figures = {"skipped": str(reason)}
        except Exception as error:  # Whatever it is: it belongs to the findings.
            figures = {"error": described(error)}
        self.add(name, figures | {"wall_seconds": round(time.perf_counter() - start, 2)})
        return None if figures.keys() & {"error", "skipped"} else figures


def described(error: Exception) -> str:
    """An error with the end of its traceback, where the cause stands."""
    lines = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}"[: LONGEST_ERROR // 2] + "\n" + lines[-LONGEST_ERROR:]


def run(
    parts: dict[str, Part], setup: Any, file: Path, head: Figures, minutes: float,
    finished: Callable[[str, Figures], None], preload: Sequence[str] = PRELOAD,
) -> Figures:  # fmt: skip
    """Run each part while there is time; `file` has everything at any moment.

    `finished` is called with a part's name and the document, to which it may add; `preload` are
    the modules that the server reads.
    """
    found: Figures = {name: {"status": "not reached", "cases": {}} for name in parts}
    document = head | {"figures": found}
    end = time.monotonic() + minutes * 60
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    for name, part in parts.items():
        start, entry = time.monotonic(), found[name]
        seconds = min(end - start, part.minutes * 60)
        if seconds <= 0:
            entry["status"] = f"skipped: the {minutes:g} minutes were over"
        else:
            entry["status"] = "running"
            process = _start(context, part, setup)
            entry["status"] = _follow(
                *process, seconds, entry["cases"], lambda: _write(file, document)
            )
        entry["seconds"] = round(time.monotonic() - start, 1)
        finished(name, document)
        _write(file, document)
    return document


def _start(context: Any, part: Part, setup: Any) -> tuple[Any, Connection]:
    """The part's process, and where its notes arrive."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part.path, setup, sender))
    process.start()
    sender.close()
    return process, receiver


def _follow(
    process: Any, receiver: Connection, seconds: float, cases: Figures, flush: Callable[[], None]
) -> str:
    """Take a part's notes until it ends or its time is over; returns how it ended."""
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            name, figures = receiver.recv()
            if name is None:
                process.join(LINGER)  # An engine has something to put away.
                return figures
            cases[name] = figures
            flush()
        return f"stopped: it had {seconds:.0f} s"
    except EOFError:
        process.join(LINGER)
        return f"failed: its process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _work(path: str, setup: Any, home: Connection) -> None:
    """What a part's process does."""
    module, _, name = path.partition(":")
    try:
        getattr(import_module(module), name)(setup, Notes(home))
        status = "done"
    except Skip as reason:
        status = f"skipped: {reason}"
    except Exception as error:
        status = f"failed: {described(error)}"
    home.send((None, status))


def _write(file: Path, document: Figures) -> None:
    partial = file.with_name(file.name + ".tmp")
    partial.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, file)
