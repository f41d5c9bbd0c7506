"""Equations, per-token losses and the table of training methods; no torch at import.

May import `types` and `utils`.
"""

from gft_lite.objective.advantages import group_advantages
from gft_lite.objective.losses import k3
from gft_lite.objective.methods import METHODS, Method, find_method
from gft_lite.objective.rectification import rectify
from gft_lite.objective.reduction import token_weights

__all__ = [
    "METHODS", "Method", "find_method", "group_advantages", "k3", "rectify", "token_weights",
]  # fmt: skip
