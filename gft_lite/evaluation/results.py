"""The results of an evaluation: figures of each target, averages, and differences of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from gft_lite.evaluation.metrics import average, compare
from gft_lite.evaluation.suites import Suite
from gft_lite.recipe.figures import check_names, figure_of, main_figure


def make_results(
    suite: Suite, labels: Sequence[str], targets: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The part of `results.json` that follows from the figures of the targets.

    `pairs` have the differences b - a. A model without an adapter is `a`, so that the difference
    from a base to its adapter is the gain of training, in whatever order they were given.
    """
    entries = {
        label: {**targets[label], "average": average(targets[label]["benchmarks"])}
        for label in labels
    }
    figures = [f for entry in entries.values() for f in entry["benchmarks"].values()]
    for found in figures:
        check_names(found)
    main = figure_of(main_figure(figures[0]))
    ks = suite.ks if main.by_k else []
    sampling = [entry["sampling"] for entry in entries.values()]
    return {
        "suite": suite.name,
        "benchmarks": {name: suite.title(name) for name in suite.names},
        "protocol": {
            "samples": min(f["samples"] // f["problems"] for f in figures),
            "k": [k for k in ks if all(n in f for f in figures for n in main.names([k]))],
            **sampling[-1],
            "reward": [function.name for function in suite.reward.functions],
        },
        "targets": entries,
        "pairs": [
            {
                "a": a,
                "b": b,
                "differences": compare(entries[a]["benchmarks"], entries[b]["benchmarks"]),
            }
            for a, b in _pairs(entries)
        ],
    }


def _pairs(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """All pairs of labels in the order given, models without an adapter first."""
    yield from combinations(sorted(entries, key=lambda n: entries[n]["adapter"] is not None), 2)
