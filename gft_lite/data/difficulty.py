"""The order of an epoch by the difficulty of its problems (`data.curriculum`)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import Literal

Curriculum = Literal["easy_first", "mixed"]


def curriculum_order(
    success: Sequence[float], curriculum: Curriculum, per_step: int, seed: int, epoch: int
) -> list[int]:
    """The positions of problems with these success shares, in the order of an epoch.

    `easy_first` goes from the largest share to the smallest; `mixed` cuts that order into
    `per_step` equal parts and takes a problem of each in turn. Equal shares, and the problems of a
    part, are in a random order of the seed and the epoch.
    """
    order = list(range(len(success)))
    shuffle = random.Random(f"{seed}/{epoch}").shuffle
    shuffle(order)
    order.sort(key=lambda i: -success[i])
    if curriculum == "easy_first":
        return order
    cuts = [part * len(order) // per_step for part in range(per_step + 1)]
    parts = [order[a:b] for a, b in pairwise(cuts)]
    for part in parts:
        shuffle(part)
    return [i for row in zip_longest(*parts) for i in row if i is not None]
