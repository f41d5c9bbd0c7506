"""Tools for users: `doctor`, `chat`, `merge`, `push`.

May import `training` and everything below it; not `experiments`.
"""

__all__ = ["chat", "doctor", "merge", "push"]
