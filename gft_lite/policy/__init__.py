"""The policy: a frozen (quantised) base with a trainable LoRA adapter.

May import `recipe` and the foundation.

Adding a back end:
1. Write `policy/NAME_policy.py` with `load(settings, seed, rollout) -> Policy` (see `base.py`).
2. Name it in `BACKENDS` (`registry.py`) and in `policy.backend` (`recipe/sections.py`).
3. Test it with the tests of `tests/integration/test_policy.py`.
"""

from gft_lite.policy.base import Policy
from gft_lite.policy.registry import BACKENDS, load_policy

__all__ = ["BACKENDS", "Policy", "load_policy"]
