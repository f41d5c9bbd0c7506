"""Equations, per-token losses and the table of training methods.

May import `types` and `utils`; importing it does not import torch.

Adding a method:
1. Write its loss in `losses.py`, or in `mixed_losses.py` if it mixes demonstrations with the
   policy's own samples: `loss(inputs: LossInputs, *, parameter=default) -> LossOutput`. The
   keyword-only arguments are its parameters in the recipe's `objective:`; metrics in the output
   are reported everywhere.
2. Name it in `METHODS` (`methods.py`, `mixed_methods.py`) with its sources, the optional inputs
   that it `needs`, its defaults, its dial and its paper; `Method` (`method.py`) has the parts of
   a loss with means of their own, the selection of a group's rows, and demonstrations' prefixes.
3. Test hand-computed values in `tests/unit/test_objective.py` or `test_mixed_losses.py`, and run
   `gft-lite audit` on it.
Adding an input of losses: a field of `LossInputs`, a name in `Need`, and the place that computes
it: `training/rows.py` if it is known of a row, `training/step_loss.py` if of a token.
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
