"""Atomic writes, locks and line-based files."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gft_lite.utils.errors import RecipeError


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file; half a line, which a kill leaves, is cut off to not spoil the next."""
    if not path.exists():
        return []
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if len(complete) < len(data):
        with path.open("rb+") as file:
            file.truncate(len(complete))
    return complete.splitlines()


LOCK = ".lock"


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Where to write what is to be at `path`: it comes there, and onto the disk, when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    yield partial
    fsync(partial)
    partial.rename(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk before going on."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock goes with the process, however it ends.

    Raises: RecipeError while another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RecipeError(
                [f"--out: must not be in use by another run, got {str(folder)!r}, in which "
                 f"process {file.read()} is at work. Wait for it, stop it, or choose another."]
            ) from error  # fmt: skip
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def cached_json(path: Path, compute: Callable[[], Any]) -> Any:
    """The JSON at `path`, computed and written first where it is not there yet."""
    if not path.exists():
        write_text_atomic(path, json.dumps(compute(), indent=1))
    return json.loads(path.read_text(encoding="utf-8"))


def complete_lines(file: Path) -> list[str]:
    """The complete lines of a file; a write that a kill cut short leaves half of one."""
    return file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
