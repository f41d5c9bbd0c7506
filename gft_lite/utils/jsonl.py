"""Append-only JSON-lines files that survive a killed writer."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from gft_lite.utils.errors import UserError, short_repr
from gft_lite.utils.files import INVALID, fsync

T = TypeVar("T")
_BLOCK = 1 << 16


class JsonlFile(Generic[T]):
    """A file with one JSON object per line, to which lines are only appended.

    `parse` converts the object of a line to an entry and raises one of `INVALID` for others.
    `rule` and `advice` are used in the error for a line that is not an entry:
    `FILE:LINE: RULE, got TEXT. ADVICE`.
    An incomplete last line, which a killed writer leaves, is not an entry; the next append
    removes it. One instance can be used by several threads.
    """

    def __init__(
        self, path: Path, parse: Callable[[dict[str, Any]], T], rule: str, advice: str
    ) -> None:
        self.path = path
        self._parse = parse
        self._rule, self._advice = rule, advice
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of complete lines."""
        return sum(1 for _ in self._lines())

    def __iter__(self) -> Iterator[T]:
        """The entries in order. Raises: UserError for a line that is not one."""
        return (entry for _, entry in self.entries())

    def entries(self) -> Iterator[tuple[int, T]]:
        """Each entry with the byte offset of its line. Raises: UserError as above."""
        for offset, line in self._lines():
            yield offset, self._entry(line, offset)

    def read_at(self, offset: int) -> T:
        """The entry of the line that starts at a byte offset. Raises: UserError as above."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return self._entry(file.readline(), offset)

    def append(self, objects: Iterable[Mapping[str, Any]]) -> list[int]:
        """Write objects to the disk and return the byte offsets of their lines."""
        lines = [json.dumps(o).encode() + b"\n" for o in objects]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("ab+") as file:
            end = _end_of_lines(file)
            file.truncate(end)
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        if not end:
            fsync(self.path.parent)  # The file may be new.
        offsets = []
        for line in lines:
            offsets.append(end)
            end += len(line)
        return offsets

    def keep_first(self, count: int) -> None:
        """Remove all lines after the first `count`."""
        offsets = [offset + len(line) for offset, line in self._lines()]
        if count < len(offsets):
            os.truncate(self.path, offsets[count - 1] if count else 0)
            fsync(self.path)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Each complete line with its byte offset."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            offset = 0
            for line in file:
                if line.endswith(b"\n"):
                    yield offset, line
                offset += len(line)

    def _entry(self, line: bytes, offset: int) -> T:
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise TypeError("not an object")
            return self._parse(value)
        except INVALID as error:
            text = short_repr(line.decode(errors="replace").rstrip("\n"))
            number = 1 + sum(start < offset for start, _ in self._lines())
            rule = f"{self.path}:{number}: {self._rule}"
            raise UserError([f"{rule}, got {text}. {self._advice}"]) from error


def _end_of_lines(file: BinaryIO) -> int:
    """The offset after the last complete line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        if found := file.read(end - start).rfind(b"\n") + 1:
            return start + found
        end = start
    return 0
