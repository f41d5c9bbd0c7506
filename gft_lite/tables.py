"""The results of an evaluation as tables: on the terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table as RichTable

_LATEX = {"\\": r"\textbackslash{}", **{c: f"\\{c}" for c in "&%$#_{}"},
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # fmt: skip
_SHOWN_CHARACTERS = 1500


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first `labels` columns are names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1

    def rich(self, width: int) -> RichTable:
        """For a terminal of `width` columns, on its side where it is too wide; without title."""
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
        """With the title as a heading."""
        marks = [":--" if i < self.labels else "--:" for i in range(len(self.header))]
        rows = (self.header, marks, *self.rows)
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
        return "\n".join([f"## {self.title}", "", *lines, ""])

    def latex(self) -> str:
        """A floating table with booktabs' rules."""
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


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Accuracy, pass@k where k goes beyond 1, the differences of pairs, and drift."""
    made = [_accuracy(results)]
    made += [_pass_at_k(results)] if len(results["protocol"]["k"]) > 1 else []
    made += [_pairs(results)] if results["pairs"] else []
    return [*made, _conduct(results)]


def _accuracy(results: Mapping[str, Any]) -> Table:
    """The shape of the paper's table: models down, benchmarks across, their average last."""
    titles = results["benchmarks"]
    rows = [
        (label, *(_percent(_figure(target, name, "pass@1")) for name in titles),
         _percent(target["average"]["pass@1"]))
        for label, target in results["targets"].items()
    ]  # fmt: skip
    n = results["protocol"]["samples"]
    title = f"Accuracy (%), the mean over {n} samples a problem"
    return Table(title, ("model", *titles.values(), "average"), tuple(rows))


def _pass_at_k(results: Mapping[str, Any]) -> Table:
    ks, titles = results["protocol"]["k"], results["benchmarks"]
    rows = [
        (title, label, *(_percent(_figure(target, name, f"pass@{k}")) for k in ks))
        for name, title in titles.items()
        for label, target in results["targets"].items()
    ]
    header = ("benchmark", "model", *(f"pass@{k}" for k in ks))
    return Table("pass@k (%)", header, tuple(rows), labels=2)


def _pairs(results: Mapping[str, Any]) -> Table:
    titles = {**results["benchmarks"], "average": "average"}
    rows = [
        (f"{pair['b']} - {pair['a']}", *(_difference(pair["differences"].get(n)) for n in titles))
        for pair in results["pairs"]
    ]
    title = "Differences in accuracy on the same problems (points, 95% interval)"
    return Table(title, ("pair", *titles.values()), tuple(rows))


def _conduct(results: Mapping[str, Any]) -> Table:
    """What accuracy hides: drift, lengths, answers not given, diversity."""
    drift = {"KL(base || model)": "forward", "KL(model || base)": "reverse", "entropy": "entropy"}
    shares = {"truncated": "truncated", "no answer": "no_answer"}
    rows = [
        (label, *(_number(target["drift"].get(key), 4) for key in drift.values()),
         _number(target["average"]["length"], 0),
         *(_percent(target["average"][key]) for key in shares.values()),
         _number(target["average"]["distinct"], 2))
        for label, target in results["targets"].items()
    ]  # fmt: skip
    header = ("model", *drift, "tokens", *(f"{name} (%)" for name in shares), "distinct answers")
    return Table("Drift and conduct (nats per token; means over the benchmarks)", header,
                 tuple(rows))  # fmt: skip


def _figure(target: Mapping[str, Any], benchmark: str, name: str) -> float | None:
    return target["benchmarks"].get(benchmark, {}).get(name)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def to_csv(results: Mapping[str, Any]) -> str:
    """One line for each model and benchmark, every figure a column."""
    lines = []
    for label, target in results["targets"].items():
        for name, figures in target["benchmarks"].items():
            low, high = figures["pass@1_interval"]
            plain = {k: v for k, v in figures.items() if isinstance(v, int | float)}
            lines.append({"model": label, "benchmark": name, **plain, "low": low, "high": high})
    return csv_text(lines)


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines as CSV; a column for every key, in the order of their appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


class Sample(NamedTuple):
    """One graded response, as an example shows it."""

    label: str
    text: str


class Examples:
    """A right and a wrong response to the same problem, of different models where there are any."""

    def __init__(self, per_benchmark: int = 3) -> None:
        self._count = per_benchmark
        self._problems: dict[tuple[str, str], tuple[str, str]] = {}
        self._right: dict[tuple[str, str], Sample] = {}
        self._wrong: dict[tuple[str, str], Sample] = {}

    def see(
        self, benchmark: str, problem: tuple[str, str, str], label: str,
        graded: Sequence[tuple[str, bool]],
    ) -> None:  # fmt: skip
        """Note a model's responses `(text, right)` to the problem `(id, text, answer)`."""
        at = benchmark, problem[0]
        self._problems[at] = problem[1:]
        for wanted, seen, other in (
            (True, self._right, self._wrong),
            (False, self._wrong, self._right),
        ):
            text = next((text for text, right in graded if right is wanted), None)
            alone = at in seen and at in other and seen[at].label != other[at].label
            if text is not None and not alone:
                seen[at] = Sample(label, _shortened(text))

    def markdown(self) -> str:
        """The examples of every benchmark, those first in which models differ."""
        both = [at for at in self._problems if at in self._right and at in self._wrong]
        both.sort(key=lambda at: self._right[at].label == self._wrong[at].label)
        lines = ["# Right and wrong answers", ""]
        for benchmark in dict.fromkeys(name for name, _ in self._problems):
            chosen = [at for at in both if at[0] == benchmark][: self._count]
            lines += [f"## {benchmark}", "", *(line for at in chosen for line in self._one(at))]
            lines += [] if chosen else ["No problem was answered both right and wrong.", ""]
        return "\n".join(lines)

    def _one(self, at: tuple[str, str]) -> list[str]:
        text, answer = self._problems[at]
        right, wrong = self._right[at], self._wrong[at]
        cells = "".join(f"<td><pre>{html.escape(s.text)}</pre></td>" for s in (right, wrong))
        # A blank line would end the HTML.
        cells = re.sub(r"\n\s*\n", "\n&nbsp;\n", cells)
        return [
            f"### {at[1]}", "", *(f"> {line}" for line in text.splitlines()), "",
            f"Answer: `{answer}`", "",
            f"<table><tr><th>right: {html.escape(right.label)}</th>"
            f"<th>wrong: {html.escape(wrong.label)}</th></tr>",
            f"<tr>{cells}</tr></table>", "",
        ]  # fmt: skip


def _shortened(text: str) -> str:
    """The start and the end of a long text; the answer stands at the end."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[...]\n{text[-half:]}"
