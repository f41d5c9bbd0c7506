"""Tools for users: `doctor`, `chat`, `merge`, `push`, and `new_recipe`, which `init` writes.

May import `training` and everything below it; not `experiments`.
"""

__all__ = ["chat", "doctor", "merge", "new_recipe", "push"]
