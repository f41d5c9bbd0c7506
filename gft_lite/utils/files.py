"""Atomic writes, folder locks, output paths and JSON files that are checked when read."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from gft_lite.utils.errors import RecipeError, UserError, short_repr

T = TypeVar("T")
LOCK = ".lock"
# What a parser raises for JSON that does not have the expected form.
INVALID = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
_PATH_RESERVE = 128  # Bytes for the longest path inside a run's folder.
_SUFFIX_RESERVE = 4  # Bytes for ".tmp".
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# --- writing ---------------------------------------------------------------------------------


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is either complete or unchanged."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path`, synced to the disk, at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    yield partial
    fsync(partial)
    partial.rename(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Sync a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException | None) -> bool:
    """True if an error, or an error that caused it, is that of a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        # Rust libraries such as safetensors report the number in their text.
        if (found := re.search(r"\(os error (\d+)\)", str(error))) and int(found[1]) in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


# --- folders ---------------------------------------------------------------------------------


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; the lock ends with the process.

    Raises: RecipeError if another process holds it.
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


def check_output_path(
    path: str | Path, field: str = "--out", kind: Literal["folder", "file"] = "folder"
) -> None:
    """Check that a folder or file can be created or overwritten at `path`.

    Raises: RecipeError that names `field`.
    """
    if advice := _unusable(os.fspath(path), kind):
        rule = f"{field}: must be a {kind} that can be written to"
        raise RecipeError([f"{rule}, got {short_repr(os.fspath(path))}. {advice}"])


def check_new_folder(path: Path, field: str) -> None:
    """Raises: UserError that names `field` for a path that can't become a new folder."""
    check_output_path(path, field, "folder")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        rule = "must be a new or empty folder"
        raise UserError([f"{field}: {rule}, got {str(path)!r}. Choose another."])


def _unusable(text: str, kind: str) -> str | None:
    """What the user can do about a path that cannot be written to, None if it can."""
    if not text or "\0" in text:
        return "Give a path, or leave the option out."
    path = Path(text).absolute()
    reserve = _PATH_RESERVE if kind == "folder" else _SUFFIX_RESERVE
    try:
        existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
        limit = os.pathconf(path.anchor, "PC_NAME_MAX")
        new_names = path.relative_to(existing).parts
        longest = max((len(os.fsencode(name)) for name in new_names), default=0)
        if kind == "file":
            longest += _SUFFIX_RESERVE
        too_long = longest > limit or len(os.fsencode(path)) + reserve > os.pathconf(
            path.anchor, "PC_PATH_MAX"
        )
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        too_long = True
    if too_long:
        return "Choose a shorter name."
    if existing == path and kind == "file":
        if path.is_dir():
            return "This is a folder: choose another name."
        existing = path.parent
    if not existing.is_dir():
        return f"{str(existing)!r} is not a folder: choose another path."
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"Make {str(existing)!r} writable, or choose another."
    return None


# --- JSON ------------------------------------------------------------------------------------


def read_json(path: Path, parse: Callable[[Any], T], rule: str, advice: str) -> T:
    """Read a JSON file and convert it by `parse`, which rejects a wrong form.

    Raises: UserError `FILE: RULE, got PROBLEM. ADVICE` for a file that is not as expected.
    """
    try:
        return parse(json.loads(path.read_bytes()))
    except INVALID as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError([f"{path}{line}: {rule}, got {describe(error)}. {advice}"]) from error


def describe(error: BaseException) -> str:
    """An error of parsing on one short line."""
    if isinstance(error, json.JSONDecodeError):
        return f"text that is not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return "bytes that are not UTF-8"
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}" if error.args else "a missing key"
    return short_repr(f"{type(error).__name__}: {error}")[1:-1]


def cached_json(
    path: Path, compute: Callable[[], Any], read: Callable[[Path], Any] | None = None
) -> Any:
    """The JSON value at `path`, computed and written first if the file does not exist.

    `read` reads and checks the file; by default its content is not checked.
    """
    if not path.exists():
        write_text_atomic(path, json.dumps(compute(), indent=1))
    return read(path) if read else json.loads(path.read_bytes())
