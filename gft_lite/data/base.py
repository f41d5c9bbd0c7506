"""The common vocabulary of the package: the rows of one file or data set, and unusable ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: The value of a cell that its file holds but that can't be read.
UNREADABLE = object()


class Unusable(Exception):
    """A row or a demonstration that can't be used; the text is the reason for the statistics."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one file or data set, parsed one at a time, because most may not be needed.

    `read` raises Unusable for a row that can't be parsed, and gives UNREADABLE for such a cell;
    all rows of a `table` have the same columns.
    """

    name: str
    count: int
    read: Callable[[int], Any]
    table: bool = False
