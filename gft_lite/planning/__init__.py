"""The memory plan: peak memory by formulas, and the choice of a recipe's memory settings.

May import `recipe` and the foundation; never torch, so that `gft-lite plan` starts fast.

Adding a model type:
1. Add its `model_type` to KNOWN_TYPES in `model_shape.py`, and what differs to `ModelShape`;
   others get an estimate by `model_estimate.py`.
2. Ship the config.json of its usual models under `configs/models/shapes/`.
3. Compare the formulas of `memory.py` with measured peaks in
   `tests/integration/test_memory_measured.py`.

Adding a setting that the plan chooses:
1. Allow `auto` in the recipe's section and name the field in AUTO_FIELDS in `planner.py`.
2. Add it to `Choice` in `memory.py`, with its effect on the formulas.
3. Give its candidates in `planner.py` and the reason for a choice in `tables.py`.
"""

from gft_lite.planning.gpus import GPUS, parse_size
from gft_lite.planning.memory import Batch, Choice, MemoryModel
from gft_lite.planning.model_shape import ModelShape, find_shape
from gft_lite.planning.planner import CARDS, Plan, choose, plan_for, resolve, with_auto
from gft_lite.planning.solve import solve

__all__ = [
    "CARDS",
    "GPUS",
    "Batch",
    "Choice",
    "MemoryModel",
    "ModelShape",
    "Plan",
    "choose",
    "find_shape",
    "parse_size",
    "plan_for",
    "resolve",
    "solve",
    "with_auto",
]
