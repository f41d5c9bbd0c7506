"""What a report reads of a run's token ledger (`log.tokens`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gft_lite.report.loading import Run

MAX_STEPS = 12  # Of a run in the panel, evenly spaced.


@dataclass(frozen=True, slots=True)
class SourceGradients:
    """The sources' gradients of one step: norms, shares of their sum, and cosines by pair."""

    step: int
    norms: Mapping[str, float | None]
    shares: Mapping[str, float]
    cosines: Mapping[str, float | None]


def gradients_by_source(runs: Iterable[Run]) -> dict[str, list[SourceGradients]]:
    """The recorded gradients of each run that has some, by its label.

    Raises: UserError for a damaged file.
    """
    found = {run.label: _of_run(run) for run in runs}
    return {label: steps for label, steps in found.items() if steps}


def _of_run(run: Run) -> list[SourceGradients]:
    records = ((step, run.folder.tokens(step)) for step in run.folder.token_steps())
    steps = [_gradients(step, record["gradients"]) for step, record in records
             if record and record["gradients"]]  # fmt: skip
    every = -(-len(steps) // MAX_STEPS) or 1
    return steps[::every]


def _gradients(step: int, found: Mapping[str, Any]) -> SourceGradients:
    norms = found["norms"]
    total = sum(norm or 0.0 for norm in norms.values())
    shares = {source: (norm or 0.0) / total if total else 0.0 for source, norm in norms.items()}
    return SourceGradients(step, norms, shares, found["cosines"])
