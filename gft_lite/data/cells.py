"""What single cells of a data set hold: texts, conversations, several answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gft_lite.data.base import Unusable
from gft_lite.data.conversations import is_message
from gft_lite.data.rows import messages_from_text


def cells_by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The cells of each column that aren't null; nested fields as `a.b`."""
    table: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            cells = {f"{name}.{k}": v for k, v in value.items()} if isinstance(
                value, Mapping) else {name: value}  # fmt: skip
            for key, cell in cells.items():
                if key is not None and cell is not None:
                    table.setdefault(str(key), []).append(_messages(cell, str(key)))
    return table


def _messages(cell: Any, name: str) -> Any:
    """The conversation that a text of a CSV file is; else the cell itself."""
    try:
        return messages_from_text(cell, name)
    except Unusable:
        return cell


def cell_text(cell: Any, *, prompt: bool) -> str:
    """The text of a cell; of a conversation all turns but the last (`prompt`), or the last one."""
    if is_conversation(cell):
        texts = [str(m.get("content", m.get("value"))) for m in cell]
        found = "\n".join(texts[:-1] or texts) if prompt else texts[-1]
    else:
        found = max(map(str, cell), key=len, default="") if isinstance(cell, list) else str(cell)
    return found.encode("utf-8", "replace").decode()  # Lone surrogates have no tokens.


def count_answers(cell: Any) -> int:
    """The answers in a cell: of a list its items, unless these are the turns of one answer."""
    if isinstance(cell, list) and not is_conversation(cell):
        return sum(map(bool, cell))
    return int(bool(cell))


def share(values: Sequence[Any], test: Any) -> float:
    """The share of the values that pass the test, 0 of none."""
    return sum(map(bool, map(test, values))) / len(values) if values else 0.0


def is_conversation(value: Any) -> bool:
    """True for a list of messages."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_list_of_texts(value: Any) -> bool:
    """True for a list of strings."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
