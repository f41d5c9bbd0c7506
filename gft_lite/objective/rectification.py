"""Dynamic coefficient rectification: the bound on the weight of unlikely tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def rectify(probs: Tensor, tau: float) -> Tensor:
    """Dynamic coefficient rectification (Eq. 5): `C(p) = sg(p) if p < tau else 1`.

    Shapes: probs [...] in [0, 1] -> coefficients [...], without gradient.
    """
    probs = probs.detach()
    return probs.masked_fill(probs >= tau, 1.0)
