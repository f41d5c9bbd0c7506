"""The figures in words: a line for each case, and what share of the GPU's arithmetic they use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_check.parts import Figures


def finish_part(name: str, document: Figures) -> None:
    """Add the GPU's name and utilisations, and print the cases, as soon as a part is over."""
    found = document["figures"]
    here = found.get("environment", {"cases": {}})["cases"]
    document["machine"]["gpu"] = here.get("machine", {}).get("gpu", document["machine"]["gpu"])
    ceiling = here.get("matmul", {}).get("tflop_per_s")
    entry = found[name]
    for figures in entry["cases"].values():
        if ceiling and "useful_tflop_per_s" in figures:
            figures["mfu"] = figures["useful_tflop_per_s"] / ceiling
            figures["hfu"] = figures["done_tflop_per_s"] / ceiling
    print(f"{name}: {entry['status'].splitlines()[0]} ({entry['seconds']} s)", flush=True)
    for case, figures in entry["cases"].items():
        print(f"  {case:24} {', '.join(_cells(figures))}", flush=True)


def print_summary(found: Figures) -> None:
    """How each part ended, and how many of its cases failed."""
    table = Table("part", "status", "seconds", "cases", "failed", "wrong")
    for name, entry in found.items():
        cases = entry["cases"].values()
        counts = len(cases), sum("error" in c for c in cases), sum(is_wrong(c) for c in cases)
        status = entry["status"].splitlines()[0]
        table.add_row(name, status, str(entry["seconds"]), *map(str, counts))
    Console(width=120).print(table)


def is_wrong(figures: Figures) -> bool:
    """Whether a case ran and its answer is not the right one."""
    return figures.get("right") is False


def _cells(figures: Figures, prefix: str = "") -> Iterator[str]:
    """Every figure as name=value, those of nested ones with the way to them."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _cells(value, f"{prefix}{name}.")
        elif name == "error":
            yield f"FAILED: {value.splitlines()[0]}"
        elif not isinstance(value, list):
            yield f"{prefix}{name}={_short(value)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
