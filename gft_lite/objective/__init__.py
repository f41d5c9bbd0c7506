"""Equations, per-token losses and the table of training methods.

May import `types` and `utils`; importing it does not import torch.

Adding a method:
1. Write its loss in `losses.py`: `loss(inputs: LossInputs, *, parameter=default) -> LossOutput`.
   The keyword-only arguments are its parameters in the recipe's `objective:`; metrics in the output
   are reported everywhere.
2. Name it in `METHODS` (`methods.py`) with its sources, the optional inputs that it `needs`, its
   defaults and its paper.
3. Test hand-computed values in `tests/unit/test_objective.py`.
A user's own method needs no edit here: `method: my_module:METHOD`.
"""

from gft_lite.objective.advantages import group_advantages
from gft_lite.objective.losses import LossInputs, LossOutput, k3
from gft_lite.objective.methods import METHODS, Method, find_method
from gft_lite.objective.rectification import rectify
from gft_lite.objective.reduction import token_weights

__all__ = [
    "METHODS",
    "LossInputs",
    "LossOutput",
    "Method",
    "find_method",
    "group_advantages",
    "k3",
    "rectify",
    "token_weights",
]
