"""Experiment trackers: TensorBoard, Weights & Biases and trackio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gft_lite.utils.tables import flatten


class Trackers:
    """The trackers of a run by name, through accelerate's interface."""

    def __init__(self, names: Sequence[str], run: str, folder: Path, config: Any) -> None:
        self._trackers: list[Any] = []
        if not names:
            return
        from accelerate import Accelerator  # Slow to import, and only trackers need it here.

        accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
        accelerator.init_trackers(run, config=flatten(config))
        self._trackers = accelerator.trackers

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send every number of a step's metrics, with nested names joined by "/"."""
        values = {k: v for k, v in flatten(metrics).items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Flush and close all trackers."""
        for tracker in self._trackers:
            tracker.finish()
