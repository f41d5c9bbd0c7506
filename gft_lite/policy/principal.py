"""PiSSA and OLoRA beside an unchanged base, as a plain LoRA of twice the rank.

Both start at factors B0 A0 of the weight, and would subtract s B0 A0 from it. A base must stay what
it is here: as the reference of the KL, as the model that engines serve, and as NF4 codes, which
can't be shifted. The adapter subtracts it instead:

    B A - B0 A0 = [B - B0, B0] [A; A - A0]

This is a LoRA of rank 2r, which is exactly zero at the start and has no large terms that cancel, so
that it may be rounded to bfloat16. Of its blocks B0 is constant, and A and A - A0 move together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from gft_lite.policy.serving_base import plain_weight

# Subspace iterations of the SVD: as many as PiSSA's authors use for their fast SVD.
_ITERATIONS = 16


def first_factors(weight: Tensor, rank: int, init: str) -> tuple[Tensor, Tensor]:
    """B0 and A0 for s = 1, the part of a weight that the adapter starts from.

    Shapes: [out, in] -> [out, r] and [r, in].
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank]
    u, s, v = torch.svd_lowrank(weight, rank, niter=_ITERATIONS)
    root = s.sqrt()
    return u * root, root[:, None] * v.T


@torch.no_grad()
def start_at_factors(model: Any, adapter: str, init: str) -> None:
    """Give a new adapter of rank 2r the blocks A0, 0 and 0, B0."""
    for layer in _layers(model):
        weight = plain_weight(layer.get_base_layer()).float()
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        rank, scale = layer.r[adapter] // 2, layer.scaling[adapter]
        b0, a0 = first_factors(weight.T if layer.fan_in_fan_out else weight, rank, init)
        if init == "pissa":  # W - s B0 A0 lacks the singular vectors. OLoRA subtracts s Q R.
            b0, a0 = b0 / math.sqrt(scale), a0 / math.sqrt(scale)
        a.data = torch.cat([a0, torch.zeros_like(a0)]).to(a)
        b.data = torch.cat([torch.zeros_like(b0), b0], 1).to(b)


def tie_blocks(model: Any, adapter: str) -> None:
    """Give the blocks of an adapter the gradients that train A and B.

    The gradient of A is the sum of its blocks'. Each gets it over sqrt(2), so that the norm is that
    of the sum, and AdamW, whose steps have no scale, moves them alike.
    """
    for layer in _layers(model):
        layer.lora_A[adapter].weight.register_hook(_both_blocks)
        layer.lora_B[adapter].weight.register_hook(_first_block)


def _both_blocks(gradient: Tensor) -> Tensor:
    one, other = gradient.chunk(2)
    return ((one + other) / math.sqrt(2)).repeat(2, 1)


def _first_block(gradient: Tensor) -> Tensor:
    one, constant = gradient.chunk(2, dim=1)
    return torch.cat([one, torch.zeros_like(constant)], 1)


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
