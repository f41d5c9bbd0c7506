"""The policy: a frozen, quantised base with a trainable LoRA adapter.

Loads models and adapters, computes token log-probs and gradients, writes adapters, and provides
the base that an engine serves. May import `recipe` and the foundation.

Adding a back end:
1. Write `policy/NAME_policy.py` with `load(settings, seed, rollout, kept) -> Policy`; see `base.py`
   for a policy, `kept_base.py` for the base of an earlier run.
2. Add it to `BACKENDS` (`registry.py`) and to `policy.backend` (`recipe/policy_section.py`).
3. Run the tests of `tests/integration/test_policy.py` on it.
"""

from gft_lite.policy.base import Policy
from gft_lite.policy.registry import BACKENDS, load_policy

__all__ = ["BACKENDS", "Policy", "load_policy"]
