"""Reward rules: from a response's text to a number and a verdict, graded in worker processes.

May import `types` and `utils`.

Adding a rule:
1. Write `rewards/NAME_rule.py` with `make(**parameters) -> Rule` (see `base.py`).
2. Name it in `REWARDS` (`registry.py`) with where it runs and whether it needs an answer.
3. Test it on golden pairs in `tests/unit`.
"""

from gft_lite.rewards.base import Grade, RewardError, Rule
from gft_lite.rewards.registry import REWARDS

__all__ = ["REWARDS", "Grade", "RewardError", "Rule"]
