"""TODO: gft_lite/runs/trackers.py"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gft_lite.utils.tables import flatten


class Trackers:
    """TensorBoard, W&B and trackio by name, as accelerate drives them."""

    def __init__(self, names: Sequence[str], run: str, folder: Path, config: Any) -> None:
        self._trackers: list[Any] = []
        if not names:
            return
        from accelerate import Accelerator  # Only a run with trackers pays for it.

        accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
        accelerator.init_trackers(run, config=flatten(config))
        self._trackers = accelerator.trackers

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send a step's numbers."""
        values = {k: v for k, v in flatten(metrics).items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Flush and finish."""
        for tracker in self._trackers:
            tracker.finish()
