"""Rollout engines: they sample responses from the base or from the newest synced adapter.

May import `policy`, `data`, `planning`, `recipe` and the foundation.

Adding an engine:
1. Write `rollout/NAME_engine.py` with a class of the protocol `RolloutEngine` (see `base.py`).
2. Name it in `ENGINES` (`registry.py`) and in `ENGINE_NAMES` (`recipe/rollout_sections.py`).
3. Test it like `tests/integration/test_transformers_engine.py`.
A user's own engine needs no edit here: `rollout.engine: my_module:MyEngine`.
"""

from gft_lite.rollout.base import Completion, Request, RolloutEngine, RolloutError, Sampling
from gft_lite.rollout.registry import ENGINES, start_engine

__all__ = [
    "ENGINES", "Completion", "Request", "RolloutEngine", "RolloutError", "Sampling",
    "start_engine",
]  # fmt: skip
