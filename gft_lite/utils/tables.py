"""Plain tables as Markdown, CSV, LaTeX and rich text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable


def import_pandas() -> Any:
    """Import pandas. Raises: ModuleNotFoundError that names the extra to install."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('frame: pip install "gft-lite[notebooks]" first.') from error
    return pandas


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, with names joined by "/" and lists as text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}/"))
        else:
            flat[name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


def results_table(columns: Mapping[str, Mapping[str, float]], title: str = "") -> RichTable:
    """A table with a row per figure and a column per model."""
    table = RichTable(title=title or None, min_width=len(title))  # A title wraps at the table.
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for figure in dict.fromkeys(name for values in columns.values() for name in values):
        cells = [_cell(values.get(figure)) for values in columns.values()]
        table.add_row(figure, *cells)
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


_LATEX = {"\\": r"\textbackslash{}", **{c: f"\\{c}" for c in "&%$#_{}"},
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells; the first `labels` columns are names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1

    def rich(self, width: int) -> RichTable:
        """A rich table without title, transposed if it is wider than `width` columns."""
        cells = [self.header, *self.rows]
        natural = 1 + sum(3 + max(map(len, column)) for column in zip(*cells, strict=True))
        if natural > width and self.labels == 1:
            cells = list(zip(*cells, strict=True))
        table = RichTable()
        for i, name in enumerate(cells[0]):
            table.add_column(name, justify="left" if i < self.labels else "right")
        for row in cells[1:]:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        return table

    def markdown(self) -> str:
        """A Markdown table below the title as a heading."""
        marks = [":--" if i < self.labels else "--:" for i in range(len(self.header))]
        rows = (self.header, marks, *self.rows)
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
        return "\n".join([f"## {self.title}", "", *lines, ""])

    def latex(self) -> str:
        """A LaTeX table float with booktabs rules."""
        align = "l" * self.labels + "r" * (len(self.header) - self.labels)
        header, *rows = (
            " & ".join(_escaped(cell) for cell in row) + r" \\" for row in (self.header, *self.rows)
        )
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(self.title)}}}",
                 rf"\begin{{tabular}}{{{align}}}", r"\toprule", header, r"\midrule", *rows,
                 r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]  # fmt: skip
        return "\n".join(lines)


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a column for every key, in the order of first appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
