"""A run's folder and its files: metrics, groups, checkpoints, console, trackers, model card.

May import `policy`, `data`, `planning`, `recipe` and the foundation.

Adding a metric of a step:
1. A metric of the loss: return it in `LossOutput.metrics`. It then is in `metrics.jsonl` under
   `objective`, on the console, in the trackers and in the report, without an edit elsewhere.
2. A metric of the graded groups: add a key to `group_metrics` (`metrics.py`); add it to `_FORMATS`
   or `_texts` (`console.py`) to show it on the console.

A tracker is added in `trackers.py`.
"""

from gft_lite.runs.folder import RunFolder, WorkerRunFolder, find_folder, stage_folder

__all__ = ["RunFolder", "WorkerRunFolder", "find_folder", "stage_folder"]
