"""The training loop, the groups of a step and the learner that updates the policy.

May import `evaluation` and everything below it.
"""

__all__: list[str] = []
