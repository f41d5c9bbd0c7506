"""The memory plan: formulas, model shapes and the choice of settings, without torch.

May import `recipe` and the foundation.
"""

__all__: list[str] = []
