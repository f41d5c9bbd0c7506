"""Tables and code spans in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import yaml
from pydantic import BaseModel


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell or ' ' for cell in row)} |\n" for row in lines) + "\n"


def cell(text: str) -> str:
    """A text with code spans as a cell."""
    spans = " ".join(text.split()).split("`")
    return "".join(
        code(span) if number % 2 else span.replace("|", "\\|").replace("<", "&lt;")
        for number, span in enumerate(spans)
    )


def code(text: str) -> str:
    """A code span that may stand in a table."""
    # A backslash before a bar would be shown in a code span of a table.
    return f"<code>{escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def as_yaml(value: Any) -> str:
    """A value as a recipe has it, in one line."""
    if isinstance(value, BaseModel):
        return as_yaml(value.model_dump(exclude_defaults=True))
    if isinstance(value, list | tuple) and value and isinstance(value[0], BaseModel):
        value = [each.model_dump(exclude_defaults=True) for each in value]
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip().replace("\n", " ")
