"""The results of an evaluation as tables: on the terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gft_lite.recipe.figures import SHARE, figure_of, main_figure
from gft_lite.utils.tables import Table, csv_text


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The main figure, pass@k if there are several k, differences of pairs, drift and lengths."""
    found = [_main_table(results)]
    found += [_by_k(results)] if len(results["protocol"]["k"]) > 1 else []
    found += [_pairs(results)] if results["pairs"] else []
    return [*found, _drift_and_lengths(results)]


def _main_table(results: Mapping[str, Any]) -> Table:
    """A row per model and a column per benchmark, with their average as the last column."""
    titles, main = results["benchmarks"], _main_figure(results)
    form = _percent if figure_of(main).unit == SHARE else _number
    rows = [
        (label, *(form(_figure(target, name, main)) for name in titles),
         form(target["average"][main]))
        for label, target in results["targets"].items()
    ]  # fmt: skip
    title = figure_of(main).title.format(results["protocol"]["samples"])
    return Table(title, ("model", *titles.values(), "average"), tuple(rows))


def _main_figure(results: Mapping[str, Any]) -> str:
    return main_figure(next(iter(results["targets"].values()))["average"])


def _by_k(results: Mapping[str, Any]) -> Table:
    """The main figure for each k, such as pass@k, in percent."""
    figure = figure_of(_main_figure(results))
    names = figure.names(results["protocol"]["k"])
    rows = [
        (title, label, *(_percent(_figure(target, benchmark, name)) for name in names))
        for benchmark, title in results["benchmarks"].items()
        for label, target in results["targets"].items()
    ]
    title = f"{figure.name.replace('*', 'k')} (%)"
    return Table(title, ("benchmark", "model", *names), tuple(rows), labels=2)


def _pairs(results: Mapping[str, Any]) -> Table:
    titles = {**results["benchmarks"], "average": "average"}
    figure = figure_of(_main_figure(results))
    form, unit = (_points, "points, ") if figure.unit == SHARE else (_difference, "")
    rows = [
        (f"{pair['b']} - {pair['a']}", *(form(pair["differences"].get(name)) for name in titles))
        for pair in results["pairs"]
    ]
    title = f"Differences in {figure.quantity} on the same problems, first model minus second"
    return Table(f"{title} ({unit}95% interval)", ("pair", *titles.values()), tuple(rows))


def _drift_and_lengths(results: Mapping[str, Any]) -> Table:
    """Drift from the base, lengths, responses without an answer, diversity."""
    drift = {"KL(base || model)": "forward", "KL(model || base)": "reverse", "entropy": "entropy"}
    shares = {"truncated": "truncated", "no answer": "no_answer"}
    rows = [
        (label, *(_number(target["drift"].get(key), 4) for key in drift.values()),
         _number(target["average"].get("length"), 0),
         *(_percent(target["average"].get(key)) for key in shares.values()),
         _number(target["average"].get("distinct"), 2))
        for label, target in results["targets"].items()
    ]  # fmt: skip
    header = ("model", *drift, "tokens", *(f"{name} (%)" for name in shares), "distinct answers")
    return Table("Drift and conduct (nats per token; means over the benchmarks)", header,
                 tuple(rows))  # fmt: skip


def _figure(target: Mapping[str, Any], benchmark: str, name: str) -> float | None:
    return target["benchmarks"].get(benchmark, {}).get(name)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _points(found: Mapping[str, Any] | None) -> str:
    return _difference(found, scale=100, digits=1)


def _difference(found: Mapping[str, Any] | None, scale: float = 1, digits: int = 3) -> str:
    if found is None:
        return "-"
    value, low, high = (scale * x for x in (found["difference"], *found["interval"]))
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def to_csv(results: Mapping[str, Any]) -> str:
    """One line per model and benchmark, one column per figure."""
    lines = []
    for label, target in results["targets"].items():
        for name, figures in target["benchmarks"].items():
            low, high = figures[f"{main_figure(figures)}_interval"]
            plain = {k: v for k, v in figures.items() if isinstance(v, int | float)}
            lines.append({"model": label, "benchmark": name, **plain, "low": low, "high": high})
    return csv_text(lines)
