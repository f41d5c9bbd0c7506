"""Accuracy of a served model on evaluation sets and suites.

May import `rollout`, `runs` and everything below them.
"""

__all__: list[str] = []
