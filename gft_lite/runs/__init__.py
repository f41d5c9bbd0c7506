"""A run's folder and what is written to it: metrics, groups, checkpoints, console, trackers, card.

May import `policy`, `data`, `planning`, `recipe` and the foundation.
"""

__all__: list[str] = []
