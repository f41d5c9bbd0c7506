"""Parts of a check, each in a process of its own, under one budget of time.

What a part breaks (a CUDA error poisons its whole process) or leaves behind, the next one never
sees; and all that it noted until then is on the disk, where a later check finds it and goes on.
The processes are forked from a server that has read torch and the models but has never touched
CUDA.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gft_lite.utils.library_output import hide_library_messages

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

    def __init__(self, home: Connection, known: Collection[str] = ()) -> None:
        self._home, self._known = home, known

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

    def case_once(self, name: str, function: Callable[..., Figures], *arguments: Any) -> None:
        """Note a case on which no other depends, unless an earlier check has done so."""
        if name not in self._known:
            self.case(name, function, *arguments)


def described(error: Exception) -> str:
    """An error with the end of its traceback, where the cause stands."""
    lines = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}"[: LONGEST_ERROR // 2] + "\n" + lines[-LONGEST_ERROR:]


def run(
    parts: dict[str, Part], setup: Any, file: Path, head: Figures, minutes: float,
    finished: Callable[[str, Figures], None], preload: Sequence[str] = PRELOAD,
    again: bool = False,
) -> Figures:  # fmt: skip
    """Run each part while there is time; `file` has everything at any moment.

    Parts and cases that the file has from an earlier check are kept; `again` runs
    those parts anew.
    `finished` is called with a part's name and the document, to which it may add; `preload` are
    the modules that the server reads. Raises: SystemExit if the file is of another machine.
    """
    document = _resumed(file, head)
    found: Figures = document["figures"]
    for name in parts:
        entry = found.setdefault(name, {"status": "not reached", "seconds": 0, "cases": {}})
        if entry["status"] != "done":
            entry["cases"] = {k: case for k, case in entry["cases"].items() if is_answered(case)}
        elif again:
            entry["cases"] = {}
    end = time.monotonic() + minutes * 60
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    for name, part in parts.items():
        start, entry = time.monotonic(), found[name]
        seconds = min(end - start, part.minutes * 60)
        if entry["status"] == "done" and not again:
            print(f"{name}: done before", flush=True)
            continue
        if seconds <= 0:
            entry["status"] = f"skipped: the {minutes:g} minutes were over"
        else:
            print(f"{name}: {seconds:.0f} s at most", flush=True)
            entry["status"] = "running"
            process = _start(context, part, setup, list(entry["cases"]))
            entry["status"] = _follow(
                *process, seconds, entry["cases"], lambda: _write(file, document)
            )
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - start, 1)
        finished(name, document)
        _write(file, document)
    return document


def is_answered(case: Figures) -> bool:
    """Whether a case has figures, and neither failed nor had no place."""
    return not case.keys() & {"error", "skipped"}


def _resumed(file: Path, head: Figures) -> Figures:
    """The document with what `file` has from an earlier check of the same things."""
    if not file.is_file():
        return head | {"figures": {}}
    before: Figures = json.loads(file.read_text(encoding="utf-8"))
    for name, value in _identity(head).items():
        old = _identity(before).get(name)
        # A package may be installed between two checks.
        if old != value and not (name.startswith("version") and None in (old, value)):
            raise SystemExit(
                f"--out: must be a new file or have results of this {name}, {value}, got {file} "
                f"with {old}. Choose another."
            )
    return before | head


def _identity(head: Figures) -> Figures:
    """What all checks in one file have in common."""
    versions = {f"version of {name}": version for name, version in head["versions"].items()}
    return {"device": head["device"], "tiny": head["tiny"], "gpu": head["machine"]["gpu"],
            **versions}  # fmt: skip


def _start(context: Any, part: Part, setup: Any, known: list[str]) -> tuple[Any, Connection]:
    """The part's process, and where its notes arrive."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part.path, setup, sender, known))
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


def _work(path: str, setup: Any, home: Connection, known: list[str]) -> None:
    """What a part's process does; it ends with the process that started it."""
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    hide_library_messages()
    module, _, name = path.partition(":")
    try:
        getattr(import_module(module), name)(setup, Notes(home, known))
        status = "done"
    except Skip as reason:
        status = f"skipped: {reason}"
    except Exception as error:
        status = f"failed: {described(error)}"
    home.send((None, status))


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _write(file: Path, document: Figures) -> None:
    partial = file.with_name(file.name + ".tmp")
    partial.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, file)
