"""The results of an evaluation as tables: on the terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gft_lite.utils.tables import Table, csv_text


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
