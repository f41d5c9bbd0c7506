"""Reward rules: from the text of a response to a score and a verdict, graded in worker processes.

May import `types` and `utils`.

Adding a rule:
1. Write `rewards/NAME_rule.py` with `make(**parameters) -> Rule` (see `base.py`).
2. Add a line to `REWARDS` in `registry.py`: where the rule runs, whether it needs a gold answer.
3. Add tests to `tests/unit/test_rewards_rules.py`.

A user's own function needs no edit here: a recipe names it as `my_module:function`, with the
signature of TRL's reward functions (see `user_function.py`). It runs in a process of its own. The
reward `judge` asks a language model (see `judge.py`).
"""

from gft_lite.rewards.base import Grade, RewardError, RewardFunction, Rule
from gft_lite.rewards.registry import REWARDS, make_rule
from gft_lite.rewards.scorer import Scorer

__all__ = ["REWARDS", "Grade", "RewardError", "RewardFunction", "Rule", "Scorer", "make_rule"]
